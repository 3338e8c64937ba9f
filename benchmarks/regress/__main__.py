"""Compare the CPU times of this checkout with a baseline of the same machine.

    python -m benchmarks.regress                    # against the newest benchmarks/results/regress-*.json
    python -m benchmarks.regress --save FILE.json   # make a baseline

CPU time of one thread, so that other work on the machine counts little. A benchmark is slower only where its median
and its fastest round both grew by more than the tolerance. Exit code: 0 nothing slower, 1 slower,
2 refused: the baseline is of another machine or other versions, or there is none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .. import harness

RESULTS = harness.ROOT / "benchmarks" / "results"
SAME = ("hardware", "cores", "threads", "python", "torch")  # else two times say nothing about the code


def here() -> dict[str, Any]:
    """What a baseline carries besides its times."""
    env = harness.environment("cpu")
    versions = env.pop("versions")
    return {**env, **versions, "threads": 1}


def measured(seconds: float, only: str) -> dict[str, Any]:
    """Run the benchmarks in a process of their own: by name, quartiles in seconds and what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", only,
            "--benchmark-timer=time.process_time", "--benchmark-disable-gc", "--benchmark-warmup=on",
            f"--benchmark-max-time={seconds}", "--benchmark-min-rounds=10", "--benchmark-columns=median,iqr,rounds",
            f"--benchmark-json={out}", str(Path(__file__).parent / "test_cpu.py"),
        ]  # fmt: skip
        if subprocess.run(command, cwd=harness.ROOT).returncode != 0:
            raise RuntimeError("regress: a benchmark failed, see above")
        found = json.loads(out.read_text())["benchmarks"]
    times = {}
    for item in found:
        stats = {name: item["stats"][name] for name in ("min", "median", "q1", "q3", "rounds", "iterations")}
        times[item["name"]] = {"group": item["group"], **stats, **item["extra_info"]}
    return times


def refusal(new: dict[str, Any], old: dict[str, Any]) -> str | None:
    """Why the two runs cannot be compared, or None."""
    different = [f"{name}: {old.get(name)} there, {new[name]} here" for name in SAME if old.get(name) != new[name]]
    if different:
        return f"the baseline is of another machine or other versions ({'; '.join(different)}); make one with --save"
    return None


def slower(new: dict[str, Any], old: dict[str, Any], tolerance: float) -> list[str]:
    """A line per benchmark of both runs that became slower."""
    lines = []
    for name, now in new.items():
        before = old.get(name)
        if before is None:
            continue
        if all(now[which] > (1 + tolerance) * before[which] for which in ("min", "median")):
            was, been = before["median"] * 1e6, now["median"] * 1e6
            lines.append(f"{name}: {been / was:.2f} x, {was:.1f} us became {been:.1f} us")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="regress", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", type=Path, help="write a baseline instead of comparing with one")
    parser.add_argument("--baseline", type=Path, help="default: the newest benchmarks/results/regress-*.json")
    parser.add_argument("--tolerance", type=float, default=0.25, help="how much longer is slower (default: 0.25)")
    parser.add_argument("--seconds", type=float, default=0.5, help="per benchmark (default: 0.5)")
    parser.add_argument("-k", default="", help="only benchmarks whose name matches, as in pytest")
    args = parser.parse_args(argv)
    if args.save is None:
        baselines = [args.baseline] if args.baseline else sorted(RESULTS.glob("regress-*.json"))
        if not baselines or not baselines[-1].exists():
            print("regress: there is no baseline; make one with --save FILE.json", file=sys.stderr)
            return 2
        old = json.loads(baselines[-1].read_text())
        if why := refusal(here(), old):
            print(f"regress: {why}", file=sys.stderr)
            return 2
    times = measured(args.seconds, args.k)
    if args.save is not None:
        args.save.write_text(json.dumps({**here(), "benchmarks": times}, indent=1) + "\n")
        print(f"wrote {args.save}: {len(times)} benchmarks")
        return 0
    lines = slower(times, old["benchmarks"], args.tolerance)
    print("\n".join(lines) or f"nothing is slower than {baselines[-1].name} by more than {args.tolerance:.0%}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
