"""A protocol: the networks, label noises, methods and seeds of a study in one file, and the runs that follow from it.

The parts of a run are those of a config file (`data: {label_noise: 0.4}`) and are read by the same parser. They are
laid on top of each other: common, network, noise, method, the method's chosen setting, seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlb_fast._args import did_you_mean

from .config import FILE_KINDS, SPLIT_KINDS, RunConfig, from_dict, override, read_yaml, to_dict
from .methods import resolve, sampled_rows

__all__ = ["Cell", "Entry", "Protocol", "Table", "Tuning", "differences", "equal_steps", "load_protocol", "noise_name"]

Values = Mapping[str, Any]
Chosen = Mapping[str, Values]
MACHINE = ("device", "num_threads", "trackers")  # what a machine decides and no number depends on


@dataclass(frozen=True)
class Entry:
    """A method of a study.

    Attributes:
        label: its name in tables.
        values: its part of the config.
        settings: the settings among which the tuning chooses; none: `values` is all.
        chosen_of: methods whose chosen settings it takes over.
    """

    label: str
    values: Values
    settings: tuple[Values, ...] = ()
    chosen_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Runs of every method with every noise and every seed of the protocol, on one network."""

    network: str
    methods: tuple[str, ...]
    noises: tuple[str, ...]


@dataclass(frozen=True)
class Tuning:
    """Where the settings are chosen: one network, one noise, one seed, on a held-out tenth of the training set."""

    network: str
    noise: str
    seed: int


@dataclass(frozen=True)
class Cell:
    """One run: its name, where it stands in the study, and its config without the places of the data.

    `tried` is the setting's number in the tuning and None in the study. `config` is None as long as a setting that it
    takes is not chosen.
    """

    name: str
    network: str
    noise: str
    method: str
    seed: int
    tried: int | None = None
    config: RunConfig | None = None


@dataclass(frozen=True)
class Protocol:
    """A study as its file has it."""

    common: RunConfig
    seeds: tuple[int, ...]
    networks: Mapping[str, Values]
    noises: Mapping[str, Values]
    methods: Mapping[str, Entry]
    tables: tuple[Table, ...]
    tuning: Tuning | None = None
    lengths: Mapping[str, int] | None = None  # network -> training images; None: steps are not equal yet

    def cells(self, chosen: Chosen | None = None) -> list[Cell]:
        """All runs in their order: table by table, first what chooses its settings, then seed by seed.

        So a command that ends early leaves whole tables of fewer seeds. `chosen`: method -> its setting.
        """
        chosen, found = chosen or {}, dict[str, Cell]()
        config: RunConfig | None
        for table in self.tables:
            tuned = [other for name in table.methods for other in (name, *self.methods[name].chosen_of)]
            for method in dict.fromkeys(name for name in tuned if self.methods[name].settings):
                for number, setting in enumerate(self.methods[method].settings):
                    assert self.tuning is not None
                    where = (self.tuning.network, self.tuning.noise, method)
                    name = f"tuning/{method}/{number}"
                    config = self.config_of(*where, [setting], self.tuning.seed)
                    found.setdefault(name, Cell(name, *where, self.tuning.seed, number, config))
            for seed in self.seeds:
                for noise in table.noises:
                    for method in table.methods:
                        name, where = f"{table.network}/{method}/{noise}/seed{seed}", (table.network, noise, method)
                        settings = [chosen.get(other) for other in self.needs(method)]
                        ready = [s for s in settings if s is not None]
                        config = self.config_of(*where, ready, seed) if len(ready) == len(settings) else None
                        found.setdefault(name, Cell(name, *where, seed, None, config))
        return list(found.values())

    def needs(self, method: str) -> tuple[str, ...]:
        """The tuned methods whose chosen settings a method takes, its own included."""
        entry = self.methods[method]
        return (*entry.chosen_of, *((method,) if entry.settings else ()))

    def base(self, network: str) -> RunConfig:
        """The common config on a network."""
        return _laid_on(self.common, f"networks.{network}", self.networks[network])

    def config_of(self, network: str, noise: str, method: str, settings: Sequence[Values], seed: int) -> RunConfig:
        """The resolved config of one run. The seed draws weights and order, and a subset and labels that are drawn."""
        base = config = self.base(network)
        parts = [
            (f"noises.{noise}", self.noises[noise]),
            (f"methods.{method}", self.methods[method].values),
            *((f"methods.{method}.settings", setting) for setting in settings),
        ]
        for where, values in parts:
            config = _laid_on(config, where, values)
        try:
            config = override(resolve(config), seed=seed)
            if self.lengths is not None:
                config = equal_steps(config, base, self.lengths[network])
        except ValueError as error:
            what = str(error).removeprefix("protocol: ")
            raise ValueError(f"protocol: {method} with {noise} on {network}: {what}") from None
        drawn = config.data.per_class is not None or (config.data.label_noise and config.data.label_file is None)
        return override(config, data_seed=seed) if drawn else config

    def with_flags(self, common: RunConfig) -> Protocol:
        """The protocol with another common part.

        Raises:
            ValueError: a field is changed that a part on top of it sets.
        """
        before, now = (_flat(to_dict(config)) for config in (self.common, common))
        changed = {name for name in now if now[name] != before[name]} - {"source"}
        parts: dict[str, Values] = {f"networks.{name}": values for name, values in self.networks.items()}
        parts |= {f"noises.{name}": values for name, values in self.noises.items()}
        for name, entry in self.methods.items():
            parts |= {f"methods.{name}": entry.values}
            parts |= {f"methods.{name}.settings": setting for setting in entry.settings}
        for where, values in parts.items():
            if both := changed & _flat(values).keys():
                flag = min(both).replace("_", "-")
                raise ValueError(f"compare: --{flag} has no effect, because {where} of the protocol sets it")
        return dataclasses.replace(self, common=common) if changed else self


def equal_steps(config: RunConfig, base: RunConfig, length: int) -> RunConfig:
    """A config with the steps, evaluations and schedule of `base`, over `length` training images.

    DLB samples `batch_size / 2` new images per step, cross entropy `batch_size`; the network gets `batch_size` rows
    with every method. So equal steps mean equal images seen (except for DLB's first step, which has no repeated rows).
    Additional forwards of a method (the copies of MrKD) count as time, not as images.

    Raises:
        ValueError: fewer images than a step of the method samples.
    """
    per_epoch, of_base = (length // sampled_rows(one) for one in (config, base))
    if not (per_epoch and of_base):
        raise ValueError(
            f"compare: {config.loss.method} needs at least {sampled_rows(config)} training images, got {length}"
        )
    steps = base.train.max_steps or max(1, base.train.epochs * of_base // base.train.accumulate)
    every = base.train.eval_every or max(1, of_base // base.train.accumulate)
    config = override(config, max_steps=steps, eval_every=every)
    if per_epoch == of_base:
        return config
    # the schedule counts epochs, and an epoch of this method has another number of steps
    factor, schedule = of_base / per_epoch, config.schedule
    schedule = dataclasses.replace(
        schedule,
        warmup_epochs=schedule.warmup_epochs * factor,
        milestones=tuple(m * factor for m in schedule.milestones),
    )
    return dataclasses.replace(config, schedule=schedule)


def differences(config: RunConfig) -> dict[str, Any]:
    """What a config has other than the trainer's defaults, without what the machine decides (places, threads).

    Two runs with equal differences are the same run.
    """
    defaults, values = _flat(to_dict(RunConfig())), _flat(to_dict(config))
    found = {name: value for name, value in values.items() if value != defaults[name] and name not in MACHINE}
    if config.data.kind in (*FILE_KINDS, *SPLIT_KINDS):
        found["source"] = config.data.kind
    if config.data.label_file is not None:
        found["noise_kind"] = noise_name(config)
    return found


def noise_name(config: RunConfig) -> str:
    """The kind of the label noise, of a label file without its folder."""
    file = config.data.label_file
    return config.data.noise_kind if file is None else f"file:{Path(file).name}"


def _flat(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in groups.values() for name, value in part.items()}


def _laid_on(config: RunConfig, where: str, values: Values) -> RunConfig:
    try:
        return from_dict(values, config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"protocol: {where}: {str(error).removeprefix('config: ')}") from None


KEYS = ("common", "seeds", "networks", "noises", "methods", "tuning", "tables")


def load_protocol(path: Path | str, load_preset: Callable[[str], RunConfig]) -> Protocol:
    """Read a protocol file and check every config that can be made from it.

    `load_preset` makes a config of the name under `common: {preset: NAME}`: `dlb_fast.presets.load_preset`.

    Raises:
        ValueError: a missing or damaged file, an unknown key or name (with the nearest known one), methods tuned with
            different numbers of settings, or a config that cannot run.
    """
    values = read_yaml("protocol", path)
    try:
        protocol = _protocol(values, load_preset)
        protocol.cells()
        for method in protocol.methods:  # a setting that cannot run is found now, not in hours
            for table in (table for table in protocol.tables if method in table.methods):
                first = [protocol.methods[other].settings[0] for other in protocol.needs(method)]
                for noise in table.noises:
                    protocol.config_of(table.network, noise, method, first, 0)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return protocol


def _protocol(values: Any, load_preset: Callable[[str], RunConfig]) -> Protocol:
    _check_keys("", values, KEYS, required=("seeds", "networks", "noises", "methods", "tables"))
    common = dict(values.get("common") or {})
    preset = common.pop("preset", None)
    base = RunConfig() if preset is None else load_preset(preset)
    networks, noises = _mapping(values, "networks"), _mapping(values, "noises")
    methods = {name: _entry(name, entry) for name, entry in _mapping(values, "methods").items()}
    sizes = {name: len(entry.settings) for name, entry in methods.items() if entry.settings}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"protocol: every tuned method must have as many settings to choose from, got {told}")
    for name, entry in methods.items():
        for other in entry.chosen_of:
            _check_name(f"methods.{name}.chosen_of", other, sizes)
    tuning = None
    if (given := values.get("tuning")) is not None:
        names = [field.name for field in dataclasses.fields(Tuning)]
        _check_keys("tuning", given, names, required=names)
        tuning = Tuning(**given)
        _check_name("tuning.network", tuning.network, networks)
        _check_name("tuning.noise", tuning.noise, noises)
    elif sizes:
        raise ValueError(f"protocol: {', '.join(sizes)} has settings to choose from, so tuning must say where")
    for key in ("seeds", "tables"):
        _check_list(key, values[key])
    seeds = tuple(values["seeds"])
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"protocol: seeds must be distinct numbers of at least 0, got {values['seeds']!r}")
    if tuning is not None and tuning.seed in seeds:
        raise ValueError(f"protocol: tuning.seed must be none of the seeds of the study, got {tuning.seed}")
    tables = []
    for number, table in enumerate(values["tables"]):
        where = f"tables[{number}]"
        names = [field.name for field in dataclasses.fields(Table)]
        _check_keys(where, table, names, required=names)
        _check_name(f"{where}.network", table["network"], networks)
        for kind, known in (("methods", methods), ("noises", noises)):
            _check_list(f"{where}.{kind}", table[kind])
            for name in table[kind]:
                _check_name(f"{where}.{kind}", name, known)
        tables.append(Table(table["network"], tuple(table["methods"]), tuple(table["noises"])))
    return Protocol(
        _laid_on(base, "common", common), seeds, networks, noises, methods, tuple(tables), tuning
    )  # fmt: skip


def _entry(name: str, values: Mapping[str, Any]) -> Entry:
    values = dict(values)
    label = str(values.pop("label", name))
    settings, chosen_of = values.pop("settings", None) or (), values.pop("chosen_of", None) or ()
    if not isinstance(settings, (list, tuple)) or not isinstance(chosen_of, (list, tuple)):
        raise ValueError(f"protocol: methods.{name}: settings and chosen_of must be lists")
    if settings and chosen_of:
        raise ValueError(f"protocol: methods.{name} has settings of its own and chosen_of; leave one out")
    return Entry(label, values, tuple(settings), tuple(chosen_of))


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    found = values[key]
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"protocol: {key} must map names to parts of a config, got {found!r}")
    for name, part in found.items():
        if not isinstance(part, Mapping | None) or "/" in str(name):
            raise ValueError(f"protocol: {key}.{name} must be a name without / with a part of a config, got {part!r}")
    return {str(name): dict(part or {}) for name, part in found.items()}


def _check_keys(where: str, values: Any, known: Sequence[str], required: Sequence[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"protocol: {where or 'the file'} must hold {', '.join(known)}, got {values!r}")
    for key in values:
        if key not in known:
            hint = did_you_mean(str(key), known) or f"; known: {', '.join(known)}"
            raise ValueError(f"protocol: unknown key {f'{where}.{key}' if where else key}{hint}")
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"protocol: {where or 'the file'} lacks {', '.join(missing)}")


def _check_list(where: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise ValueError(f"protocol: {where} must be a list of at least one entry, got {value!r}")


def _check_name(where: str, name: Any, known: Mapping[str, Any]) -> None:
    if name not in known:
        hint = did_you_mean(str(name), known) or f"; known: {', '.join(known)}"
        raise ValueError(f"protocol: {where} names {name!r}, which is not there{hint}")
