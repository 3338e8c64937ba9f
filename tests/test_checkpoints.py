"""A criterion in other people's checkpoints: torch.distributed.checkpoint, safetensors, copies, ranks, damage."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from method_cases import CLASSES, make
from test_buffer import expected, overlapping, through_disk
from test_methods_state import Run
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state

from dlb_fast import LastBatchLoss, LogitBuffer, PsKDLoss
from dlb_fast.buffer import UNKNOWN_ID, pack_state, unpack_state
from dlb_fast.methods import METHODS

torch.set_num_threads(1)
KEY = "criterion._extra_state"
quiet = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning", "ignore::FutureWarning")


def batches(dtype=torch.float32, seed=0):
    """Three batches of 4 + 4 rows; the first has 4 new rows only."""
    made = overlapping(torch.Generator().manual_seed(seed), [4, 4, 4])
    return [(z.to(dtype), y, ids) for z, y, ids in made]


def trained(steps, logits=torch.float32, *, seed=0, **options):
    """A criterion after some batches of logits of a dtype."""
    criterion = LastBatchLoss(6, impl="torch", **options)
    for batch in batches(logits, seed)[:steps]:
        criterion(*batch)
    return criterion


class Model(nn.Module):
    """A network that owns its criterion, as in Lightning and Hugging Face."""

    def __init__(self, criterion):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.criterion = nn.Linear(3, 6), criterion

    def forward(self, x, *target):
        return self.criterion(self.net(x), *target)


# ---- the layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float16}, {"dtype": torch.float64}, {"weight": torch.ones(6)}], ids=str
)
def test_the_state_has_the_same_size_before_and_after_training(dtype, options):
    if "weight" in options:
        options = {"weight": torch.ones(6, dtype=dtype)}
    sizes = set()
    for steps in range(4):
        criterion = trained(steps, dtype, capacity=4, **options)
        for _ in range(2):
            state = criterion.state_dict()
            sizes.add(tuple((name, value.shape, value.dtype, value.device.type) for name, value in state.items()))
            criterion.reset()
    assert len(sizes) == 1


def test_without_a_capacity_the_size_is_known_after_the_first_batch():
    assert trained(0).state_dict()["_extra_state"].shape == (0,)
    first, second, third = (trained(steps).state_dict()["_extra_state"] for steps in (1, 2, 3))
    assert first.shape == second.shape == third.shape
    assert first.numel() == trained(1, capacity=4, dtype=torch.float32).state_dict()["_extra_state"].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capacity", [None, 4, 9])
def test_rows_ids_and_counters_are_saved_bit_for_bit(dtype, capacity):
    criterion = trained(3, dtype, capacity=capacity)
    z, _, ids = batches(dtype)[2]
    for loaded in (trained(0, capacity=capacity), trained(2, dtype, seed=1, capacity=capacity)):
        loaded.load_state_dict(through_disk(criterion.state_dict()))
        buffer = loaded.buffer
        assert buffer.dtype == dtype and torch.equal(buffer.logits, z[4:]) and torch.equal(buffer.ids, ids[4:])
        assert [int(buffer.taught), int(buffer.mismatched), int(buffer.untaught)] == [8, 0, 0]
        assert torch.equal(loaded.get_extra_state(), criterion.get_extra_state())


def test_rows_without_ids_and_rows_that_are_not_finite_stay_what_they_are():
    z, y, _ = batches()[0]
    z[1, 2] = float("inf")
    saved, loaded = trained(0, capacity=4), trained(0, capacity=4)
    saved(z, y)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.buffer.ids.tolist() == [UNKNOWN_ID] * 4 and torch.equal(loaded.buffer.logits, z)
    z1, y1, ids = batches()[1]
    for criterion in (saved, loaded):
        criterion(z1, y1)
    assert int(loaded.buffer.not_finite) == int(saved.buffer.not_finite) == 1
    assert torch.equal(loaded.parts.lb, saved.parts.lb) and loaded.parts.lb > 0
    saved.load_state_dict(loaded.state_dict())
    saved(torch.cat([z1[4:], z1[4:]]), y1, torch.cat([ids[4:], ids[4:] + 4]))
    assert int(saved.buffer.unknown) == 4 and saved.parts.lb == 0  # a row without an id teaches none that has one


def test_the_bare_buffer_has_the_same_shapes_before_and_after_training(tmp_path):
    """For loops around `dlb_step`, which own a buffer and no criterion."""
    buffer, fresh = LogitBuffer(6, 5), LogitBuffer(6, 5)
    z, _, ids = batches()[0]
    buffer.update(z, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"buffer": buffer.state_dict()}, checkpoint_id=tmp_path)
        state = {"buffer": fresh.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path)
    assert fresh.load_state_dict(state["buffer"])
    assert torch.equal(fresh.logits, z) and torch.equal(fresh.ids, ids) and fresh.count == 4
    assert torch.equal(unpack_state(pack_state(buffer.state_dict(), 8))["logits"], buffer.state_dict()["logits"])


# ---- savers


def by_safetensors(saved, loaded, folder):
    loaded.load_state_dict(safetensors.torch.load(safetensors.torch.save(saved.state_dict())))


def by_torch(saved, loaded, folder):
    torch.save(saved.state_dict(), folder / "state.pt")
    loaded.load_state_dict(torch.load(folder / "state.pt", weights_only=True, mmap=True))


def by_assignment(saved, loaded, folder):
    loaded.load_state_dict(through_disk(saved.state_dict()), assign=True)


def by_dcp(saved, loaded, folder):
    dcp.save({"model": saved.state_dict()}, checkpoint_id=folder)
    state = {"model": loaded.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    loaded.load_state_dict(state["model"])


def by_dcp_as_stateful(saved, loaded, folder):
    dcp.save({"model": saved}, checkpoint_id=folder)
    dcp.load({"model": loaded}, checkpoint_id=folder)


def by_dcp_async(saved, loaded, folder):
    dcp.async_save({"model": saved.state_dict()}, checkpoint_id=folder).result()
    dcp.load({"model": loaded}, checkpoint_id=folder)


def by_model_state_dict(saved, loaded, folder):
    dcp.save(dcp_state.get_model_state_dict(saved), checkpoint_id=folder)
    state = dcp_state.get_model_state_dict(loaded)
    dcp.load(state, checkpoint_id=folder)
    assert not any(dcp_state.set_model_state_dict(loaded, state))


def by_full_state_dict(saved, loaded, folder):
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = through_disk(dcp_state.get_model_state_dict(saved, options=options))
    assert not any(dcp_state.set_model_state_dict(loaded, state, options=options))


def by_state_dict_with_optimizer(saved, loaded, folder):
    optimizers = [torch.optim.AdamW(model.parameters()) for model in (saved, loaded)]
    model, optimizer = dcp_state.get_state_dict(saved, optimizers[0])
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    model, optimizer = dcp_state.get_state_dict(loaded, optimizers[1])
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder)
    dcp_state.set_state_dict(
        loaded, optimizers[1], model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


SAVERS = [
    by_torch, by_assignment, by_safetensors, by_dcp, by_dcp_as_stateful, by_dcp_async, by_model_state_dict,
    by_full_state_dict, by_state_dict_with_optimizer,
]  # fmt: skip


@quiet
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("used", [False, True], ids=["empty", "used"])
@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
def test_a_model_with_a_criterion_goes_on_as_if_nothing_had_happened(save, used, dtype, tmp_path):
    weight = torch.linspace(0.5, 2.0, 6, dtype=dtype)
    saved = Model(trained(2, dtype, capacity=4, weight=weight))
    loaded = Model(trained(3 * used, dtype, seed=1, capacity=4, weight=torch.ones(6, dtype=dtype)))
    with torch.no_grad():
        saved.net.weight.mul_(3.0)
    save(saved, loaded, tmp_path)
    assert torch.equal(loaded.net.weight, saved.net.weight)
    assert torch.equal(loaded.criterion.weight, weight)
    got, want = (model.criterion(*batches(dtype)[2]) for model in (loaded, saved))
    assert torch.equal(got, want) and loaded.criterion.parts.lb > 0
    if dtype == torch.float64:
        assert got.item() == pytest.approx(expected(batches(dtype), weight=weight)[2], rel=1e-12)


@quiet
@pytest.mark.parametrize("used", [False, True], ids=["empty", "used"])
def test_a_criterion_saved_before_its_first_batch_empties_another(used, tmp_path):
    loaded = Model(trained(2 * used, capacity=4))
    by_dcp(Model(trained(0, capacity=4)), loaded, tmp_path)
    z, y, ids = batches(torch.float64)[0]
    assert loaded.criterion(z, y, ids).item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-7)
    if not used:  # nothing has chosen a dtype yet
        assert loaded.criterion.buffer.dtype == torch.float64 and torch.equal(loaded.criterion.buffer.logits, z)


# ---- ranks


def on_rank(rank):
    """This rank's batches differ from those of the others, as in every data-parallel run."""
    return [(z + rank, y, ids + 100 * rank) for z, y, ids in batches(seed=rank)]


def ranks_with_keys_of_their_own(folder):
    rank = torch.distributed.get_rank()
    saved, loaded = (trained(0, capacity=4) for _ in range(2))
    for batch in on_rank(rank)[:2]:
        saved(*batch)
    dcp.save({"criterion": {str(rank): saved.state_dict()}}, checkpoint_id=folder)
    state = {"criterion": {str(rank): loaded.state_dict()}}
    dcp.load(state, checkpoint_id=folder)
    loaded.load_state_dict(state["criterion"][str(rank)])
    return torch.equal(loaded(*on_rank(rank)[2]), saved(*on_rank(rank)[2])), loaded.parts.lb.item()


def test_every_rank_loads_its_own_rows_from_a_key_of_its_own(process_group, tmp_path):
    results = process_group(ranks_with_keys_of_their_own, tmp_path)
    assert all(same and lb > 0 for same, lb in results) and results[0] != results[1]


def ranks_with_one_key(folder, kind, with_ids):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, models = torch.distributed.get_rank(), []
    for _ in range(2):
        model = Model(trained(0, capacity=4, weight=torch.ones(6)))
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        elif kind == "fsdp":
            model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        models.append(model)
    saved, loaded = models

    def criterion_of(model):
        return getattr(model, "module", model).criterion

    first, second, third = [(z, y, ids if with_ids else None) for z, y, ids in on_rank(rank)]
    criterion_of(saved)(*first)
    criterion_of(saved)(*second)
    options = dcp_state.StateDictOptions(full_state_dict=kind == "broadcast", broadcast_from_rank0=kind == "broadcast")
    state = dcp_state.get_model_state_dict(saved, options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind != "broadcast":
            dcp.save(state, checkpoint_id=folder)
            state = dcp_state.get_model_state_dict(loaded)
            dcp.load(state, checkpoint_id=folder)
        dcp_state.set_model_state_dict(loaded, state, options=options)
    said = [str(one.message) for one in caught if "the saved buffer does not fit" in str(one.message)]
    got, want = criterion_of(loaded)(*third), criterion_of(saved)(*third)
    lb = criterion_of(loaded).parts.lb.item()
    loaded(torch.ones(8, 3), *third[1:]).backward() if kind in ("ddp", "fsdp") else None
    return torch.equal(got, want), lb, said


@quiet
@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "no-ids"])
@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp", "broadcast"])
def test_the_rows_of_one_rank_never_teach_another(kind, with_ids, process_group, tmp_path):
    """Under one key torch keeps the tensor of one rank. It has its rows back; the others say why they start empty."""
    results = process_group(ranks_with_one_key, tmp_path, kind, with_ids)
    owners = [rank for rank, (same, _, _) in enumerate(results) if same]
    assert len(owners) == 1
    (_, none, said), (_, some, silent) = results[1 - owners[0]], results[owners[0]]
    assert none == 0 < some and len(said) == 1 and not silent
    assert f"saved by rank {owners[0]} of 2, loaded by rank {1 - owners[0]} of 2" in said[0]


def saved_on_this_rank():
    return trained(2, capacity=4).get_extra_state(), trained(0, capacity=4).get_extra_state()


def test_another_number_of_ranks_is_said_where_there_are_rows(process_group):
    (_, _), (rows, none) = process_group(saved_on_this_rank)
    criterion = trained(1, capacity=4)
    with pytest.warns(UserWarning, match="saved by rank 1 of 2, loaded by rank 0 of 1.*a key of its own"):
        criterion.set_extra_state(rows)
    assert criterion.buffer.count == 0
    criterion.set_extra_state(none)


# ---- what does not fit


def changed(packed, start, values):
    packed = packed.clone()
    packed[start : start + len(values)] = torch.tensor(values, dtype=torch.uint8)
    return packed


def damaged_states():
    packed = trained(2, capacity=4).get_extra_state()
    yield "truncated", packed[:-1]
    yield "short", packed[:30]
    yield "longer", torch.cat([packed, packed[:8]])
    yield "zeros", torch.zeros_like(packed)
    yield "float", packed.float()
    yield "two dimensions", packed[None]
    yield "no data", packed.to("meta")
    yield "none", None
    yield "number", 3
    yield "list", [packed]
    yield "dict of another module", {"rows": torch.zeros(4, 6)}
    yield from ((f"byte {at}", changed(packed, at, [int(packed[at]) ^ 64])) for at in range(0, len(packed), 7))
    # The state of `buffer.state_dict()`, whose numbers no checksum guards.
    state = trained(2, capacity=4).buffer.state_dict()
    for name, value in {
        "count": [5, -1, "4", None, 2.0, 10**12],
        "capacity": [0, 3, 10**12, None],
        "num_classes": [0, 5, 7, None],
        "rank": [1, -1, None],
        "world_size": [2, None],
        "logits": [
            None, torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4), torch.zeros(3, 6),
            torch.zeros(4, 6).to(torch.float8_e5m2),
        ],
        "ids": [None, torch.zeros(4), torch.zeros(5, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64)],
        "mismatched": [None, -1, 0.5, 2**63],
        "version": [7, None, "1"],
    }.items():  # fmt: skip
        yield from ((f"{name} {index}", {**state, name: one}) for index, one in enumerate(value))
        yield f"no {name}", {key: one for key, one in state.items() if key != name}


DAMAGED = dict(damaged_states())


@pytest.mark.parametrize("name", [name for name in DAMAGED if name not in ("none", "no version")])
def test_a_state_that_does_not_fit_is_dropped_in_one_sentence(name):
    z, y, ids = batches()[2]
    for criterion in (trained(steps, capacity=capacity) for steps in (0, 2) for capacity in (4, None)):
        with pytest.warns(UserWarning, match="the saved buffer does not fit .*restarts empty") as warned:
            criterion.load_state_dict({"_extra_state": DAMAGED[name]})
        assert len(warned) == 1
        assert criterion.buffer is None or criterion.buffer.count == 0
        assert criterion(z[4:], y[4:], ids[4:]).item() == pytest.approx(F.cross_entropy(z[4:], y[4:]).item(), rel=1e-6)
        assert criterion.state_dict()["_extra_state"].numel() > 0


def test_another_capacity_fits_as_long_as_the_rows_do():
    saved = trained(2, capacity=9)
    for capacity in (4, 5, 12):
        loaded = trained(0, capacity=capacity)
        loaded.load_state_dict(saved.state_dict())
        assert (loaded.buffer.capacity, loaded.buffer.count) == (capacity, 4)
        assert loaded(*batches()[2]).item() == pytest.approx(expected(batches())[2], rel=2e-6)
    with pytest.warns(UserWarning, match=r"does not fit \(capacity 3, saved 4 rows\)"):
        trained(0, capacity=3).load_state_dict(saved.state_dict())
    with pytest.warns(UserWarning, match=r"expected logits \(9, 7\), got \(9, 6\)"):
        LastBatchLoss(7, capacity=9).load_state_dict(saved.state_dict())


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize(
    ("of_state", "of_criterion", "wanted"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_rows_of_another_dtype_lose_nothing(of_state, of_criterion, wanted, capacity):
    """The dtype that follows the logits becomes one that holds the saved rows and the criterion's own."""
    saved, loaded = trained(2, of_state, capacity=capacity), trained(1, of_criterion, capacity=capacity)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.buffer.dtype == wanted
    assert torch.equal(loaded.buffer.logits, batches(of_state)[1][0][4:].to(wanted))


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_dtype_asked_for_stays(dtype, capacity):
    """The rows are then as if they had been stored in it, and so is a row that overflows."""
    saved = trained(2, torch.float64, capacity=capacity)
    for steps in (0, 1):
        loaded = LastBatchLoss(6, capacity=capacity, dtype=dtype, impl="torch")
        for batch in batches(torch.float64, 1)[:steps]:
            loaded(*batch)
        state = saved.buffer.state_dict()
        state["logits"][2, 1] = 1e300
        loaded.load_state_dict({"_extra_state": state})
        assert loaded.buffer.dtype == dtype
        assert torch.equal(loaded.buffer.logits, state["logits"][:4].to(dtype))
        loaded(*batches(torch.float64)[2])
        assert int(loaded.buffer.not_finite) == int(dtype != torch.float64)


def test_loading_keeps_the_address_of_a_buffer_that_fits():
    """A captured graph goes on with the loaded rows."""
    loaded = trained(2, seed=1, capacity=4)
    buffer, addresses = loaded.buffer, (loaded.buffer.rows.data_ptr(), loaded.buffer.slots.data_ptr())
    loaded.load_state_dict(through_disk(trained(2, capacity=4).state_dict()))
    assert loaded.buffer is buffer and addresses == (buffer.rows.data_ptr(), buffer.slots.data_ptr())
    assert torch.equal(buffer.logits, batches()[1][0][4:])


# ---- copies


def by_deepcopy(criterion):
    return copy.deepcopy(criterion)


def by_pickle(criterion):
    return pickle.loads(pickle.dumps(criterion))


def by_torch_save(criterion):
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_averaging(criterion):
    model = Model(criterion)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    average.update_parameters(model)
    average.update_parameters(model)
    again = torch.optim.swa_utils.AveragedModel(Model(trained(0, capacity=4, weight=torch.zeros(6))))
    again.load_state_dict(through_disk(average.state_dict()))
    return again.module.criterion


@pytest.mark.parametrize("make", [by_deepcopy, by_pickle, by_torch_save, by_averaging], ids=lambda make: make.__name__)
def test_a_copy_is_independent_and_remembers_the_same(make):
    weight = torch.linspace(0.5, 2.0, 6)
    criterion = trained(2, capacity=4, weight=weight)
    before = criterion.get_extra_state()
    twin = make(criterion)
    assert torch.equal(twin.weight, weight) and torch.equal(twin.get_extra_state(), before)
    assert twin(*batches()[2]).item() == pytest.approx(expected(batches(), weight=weight.double())[2], rel=2e-6)
    assert torch.equal(criterion.get_extra_state(), before)
    twin.reset()
    assert criterion(*batches()[2]).item() == pytest.approx(expected(batches(), weight=weight.double())[2], rel=2e-6)


@pytest.mark.parametrize("steps", [0, 2])
def test_an_ema_over_the_values_of_a_state_dict_meets_equal_shapes(steps):
    """timm's ModelEmaV2 and V3 walk over the two state dicts in parallel."""
    model = Model(trained(0, capacity=4, weight=torch.ones(6)))
    average = copy.deepcopy(model)
    for batch in batches()[:steps]:
        model.criterion(*batch)
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mean.copy_(0.9 * mean + 0.1 * value)
    torch.testing.assert_close(average.net.weight, model.net.weight)


# ---- class weights


def forgets(criterion):
    """A checkpoint without a memory is loaded with a warning where the method has one."""
    remembers = type(criterion).get_extra_state is not nn.Module.get_extra_state
    return pytest.warns(UserWarning, match="has no '_extra_state'") if remembers else warnings.catch_warnings()


NETWORK = nn.Linear(7, CLASSES)


def made(name, **options):
    criterion = make(name, **options)
    criterion.setup(NETWORK)
    return criterion


@pytest.mark.parametrize("name", METHODS)
def test_class_weights_behave_as_in_cross_entropy(name):
    first, second = torch.linspace(0.5, 2.0, CLASSES), torch.linspace(3.0, 0.1, CLASSES)
    criterion, plain = made(name, weight=first.clone()), nn.CrossEntropyLoss(weight=second)
    z, y = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0)), torch.arange(8) % CLASSES
    assert dict(criterion.named_buffers()).keys() == {"weight"}
    assert torch.equal(criterion.state_dict()["weight"], first)
    assert criterion.eval()(z, y).item() == pytest.approx(F.cross_entropy(z, y, first).item(), rel=1e-6)
    own = criterion.weight
    with forgets(criterion):
        criterion.load_state_dict(through_disk(plain.state_dict()))
    assert criterion.weight is own and torch.equal(own, second)
    assert criterion(z, y).item() == pytest.approx(F.cross_entropy(z, y, second).item(), rel=1e-6)
    saved = criterion.state_dict()
    plain.load_state_dict({"weight": saved["weight"]})
    # Set later, moved, taken away.
    criterion.weight = first.double()
    assert criterion(z.double(), y).item() == pytest.approx(F.cross_entropy(z.double(), y, first.double()).item())
    assert criterion.to(torch.float32).weight.dtype == torch.float32
    assert copy.deepcopy(criterion).to("meta").weight.device.type == "meta"
    criterion.weight = None
    assert "weight" not in criterion.state_dict()
    assert criterion(z, y).item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-6)
    # strict says what it says for torch's module
    for loaded, state, said in (
        (criterion, saved, 'Unexpected key.*"weight"'),
        (made(name, weight=first), criterion.state_dict(), 'Missing key.*"weight"'),
        (made(name, weight=first), {**saved, "weight": torch.ones(CLASSES + 1)}, "size mismatch for weight"),
    ):
        with pytest.raises(RuntimeError, match=said):
            loaded.load_state_dict(state)


def test_class_weights_of_an_uninitialised_module_are_assigned():
    """Large models are made on the meta device and take over the tensors of a checkpoint."""
    model = Model(LastBatchLoss(6, capacity=4, weight=torch.ones(6), impl="torch")).to("meta")
    weight = torch.linspace(0.5, 2.0, 6)
    saved = Model(trained(2, capacity=4, weight=weight))
    model.load_state_dict(saved.state_dict(), assign=True)
    got = model.criterion(*batches()[2])
    assert torch.equal(got, saved.criterion(*batches()[2])) and torch.equal(model.criterion.weight, weight)


# ---- the other methods


def saved_sizes(criterion):
    return {name: (value.shape, value.dtype) for name, value in criterion.state_dict().items()}


def method(name):
    """A run with a method whose sizes are known before the first batch."""
    options = {"capacity": 4} if name in ("dlb", "two_view") else {}
    return Run(make(name, weight=torch.linspace(0.5, 2.0, CLASSES), **options))


@quiet
@pytest.mark.parametrize("used", [False, True], ids=["empty", "used"])
@pytest.mark.parametrize("save", [by_safetensors, by_dcp, by_model_state_dict], ids=lambda save: save.__name__)
@pytest.mark.parametrize("name", ["dlb", "ps_kd", "elr", "mr_kd", "bake"])
def test_every_method_goes_on_as_if_nothing_had_happened(name, save, used, tmp_path):
    whole, saved, loaded = method(name), method(name), method(name)
    losses = whole.steps(0, 6)
    if name == "mr_kd" or used:  # the classes of its ensemble are known after the first batch
        loaded.steps(0, 4 if used else 1)
    saved.steps(0, 3)
    for part in ("model", "optimizer"):
        getattr(loaded, part).load_state_dict(copy.deepcopy(getattr(saved, part).state_dict()))
    if saved.criterion.state_dict():
        save(saved.criterion, loaded.criterion, tmp_path)
    assert loaded.steps(3, 6) == losses[3:]
    assert all(map(torch.equal, loaded.criterion.state_dict().values(), whole.criterion.state_dict().values()))


@pytest.mark.parametrize("steps", [0, 1])
def test_samples_that_were_never_seen_are_not_in_a_saved_bank(steps):
    saved, loaded = (PsKDLoss(6, CLASSES, alpha=0.5, impl="torch") for _ in range(2))
    z = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0))
    y, ids = torch.arange(4), torch.tensor([5, 0, 3, 2])
    for _ in range(steps):
        saved(z, y, ids)
    loaded.load_state_dict(through_disk(saved.state_dict()))
    unseen = loaded(z[:2], y[:2], torch.tensor([1, 4]))
    assert unseen.item() == pytest.approx(F.cross_entropy(z[:2], y[:2]).item(), rel=1e-6)
    seen = ids[:2]
    assert torch.equal(loaded(2 * z[:2], y[:2], seen), saved(2 * z[:2], y[:2], seen))


@pytest.mark.parametrize("name", METHODS)
def test_every_state_is_of_tensors_whose_sizes_do_not_change(name):
    run = method(name)
    before = saved_sizes(run.criterion)
    run.steps(0, 1)
    if name == "mr_kd":
        before = saved_sizes(run.criterion)
    for step in range(1, 5):
        assert saved_sizes(run.criterion) == before
        run.steps(step, step + 1)


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_model_and_criterion_is_independent(name):
    """The copy of a criterion that is attached to a network is attached to the copy of the network."""
    run = method(name)
    run.steps(0, 3)
    twin = copy.deepcopy(run)
    assert twin.model is not run.model
    twin.optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.3)
    before = copy.deepcopy(run.criterion.state_dict())
    losses = twin.steps(3, 6)
    assert all(map(torch.equal, run.criterion.state_dict().values(), before.values()))
    assert run.steps(3, 6) == losses


@pytest.mark.parametrize("name", ["ps_kd", "elr", "mr_kd"])
def test_a_foreign_memory_is_refused(name):
    run = method(name)
    run.steps(0, 3)
    good = run.criterion.state_dict()
    packed = good["_extra_state"]
    foreign = [None, {}, [1], torch.zeros(3, dtype=torch.int64), packed[:-1], trained(1).get_extra_state()]
    if name == "mr_kd":
        other = make(name, ensemble_lr=None)
        other.setup(nn.Linear(2, 2))
        foreign += [torch.zeros_like(packed), changed(packed, 50, [1, 2, 3]), other.get_extra_state()]
    for state in foreign:
        with pytest.raises(ValueError, match="expected|checksum|bytes more"):
            run.criterion.load_state_dict({**good, "_extra_state": state})
        assert all(map(torch.equal, run.criterion.state_dict().values(), good.values()))
