"""Steps of lane.sh that no other benchmark has; each writes JSON lines to --out as it goes.

python benchmarks/gpu/lane.py together|quantised|profile|table --out FOLDER [--device cuda] [--models ...] [--rounds 4]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent / "speed"))

from together import PARTS, RANK, ROWS, SIZE, folder

from fedara_flwr import engine, strategies
from fedara_flwr.adapters.learner import Learner, open_learner
from fedara_flwr.client import session, step, train
from fedara_flwr.client.vote import SlotVote
from fedara_flwr.config import Settings
from fedara_flwr.data.federation import federation
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.server.evaluate import ServerModel
from fedara_flwr.server.loop import Callback, RoundLoop
from fedara_flwr.tasks import Encoded, open_task, read_settings
from fedara_flwr.training import LocalTraining
from fedara_flwr.wire.plan import TrainPlan

TASK = open_task(Settings().data)
CLIENTS, STEPS = 20, 6


def synchronised(device: str) -> float:
    """Seconds of the wall clock, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Report:
    """Lines to one file and to the screen."""

    problems = 0
    """Lines of all reports that say why something was not measured."""

    def __init__(self, folder: Path, name: str, device: str) -> None:
        self.path = folder / f"{name}.jsonl"
        self.card = torch.cuda.get_device_name() if device == "cuda" else "cpu"

    def __call__(self, **line: Any) -> None:
        Report.problems += "problem" in line
        line["card"] = self.card
        print(json.dumps(line), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


# -- whole runs with run.together --------------------------------------------------------------------------------------
def run_rounds(settings: Settings, model: ServerModel) -> list[dict[str, Any]]:
    """A whole run without the server's evaluation: seconds and clients of each round."""
    device, found = settings.run.device, []
    began = 0.0

    class Times(Callback):
        def record(self, line: dict) -> None:
            nonlocal began
            if line["type"] == "round":
                now = synchronised(device)
                found.append({"seconds": now - began, "clients": line["good"], "loss": line.get("client-loss")})
                began = now

    method = strategies.find(settings.method)(settings, model)
    loop = RoundLoop(settings, method, method.start(), model.expected(method.all_terms(), method.parts), [Times()])
    arrays = loop.initial_arrays()
    for held in session._resident.values():
        held.adapted.costs.clear()  # each run counts its masks' FLOPs anew
    began = synchronised(device)
    loop.start(
        engine.InProcessGrid(settings.to_flat(), CLIENTS),
        arrays,
        settings.num_server_rounds,
        evaluate_fn=lambda server_round, arrays: None,
    )
    return found


def run_settings(path: str, dtype: str, args: argparse.Namespace, **changes: Any) -> Settings:
    flat = {"model.name": path, "model.dtype": dtype, "run.device": args.device, "num-server-rounds": args.rounds}
    drawn = {"head.start": "random", "train.loss": "plain", "wire.down": "float32", "wire.up": "float32"}
    return read_settings(flat | drawn | {"strategy.round-timeout": 86400.0} | changes)


def whole_together(args: argparse.Namespace) -> None:
    """Runs of run.together 1, 2 and 5 in turn, by model and dtype; the first two rounds of each run are not counted."""
    report = Report(args.out, "together-runs", args.device)
    torch.set_num_threads(1)
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as root:
            path = folder(name, Path(root))
            for dtype in args.dtypes.split(","):
                model = ServerModel(run_settings(path, dtype, args))
                run_rounds(run_settings(path, dtype, args, **{"num-server-rounds": 1}), model)
                for repeat in range(args.repeats):
                    for together in (1, 2, 5):
                        settings = run_settings(path, dtype, args, **{"run.together": together})
                        rounds = run_rounds(settings, model)
                        rest = rounds[min(2, len(rounds) - 1) :]
                        each = 1000 * sum(r["seconds"] for r in rest) / sum(r["clients"] for r in rest)
                        report(
                            model=name,
                            dtype=dtype,
                            together=together,
                            repeat=repeat,
                            rounds=len(rounds),
                            **{"ms-per-client-round": each, "seconds": [round(r["seconds"], 4) for r in rounds]},
                            loss=rounds[-1]["loss"],
                        )
                session._resident.clear()
                del model


# -- one client's call -------------------------------------------------------------------------------------------------
class Call:
    """One client's training as `client.train.train` does it, rank 12 on every module, docstrings."""

    def __init__(self, path: str, dtype: str, device: str, mask_from: int = 0) -> None:
        settings = read_settings({"model.name": path, "model.dtype": dtype})
        data = federation(settings.data, settings.seed, TASK)
        self.device, self.dtype = device, dtype
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.learner = open_learner(settings, data.labels, device)
        self.adapted = self.learner.adapted
        spec = self.adapted.spec
        mask = RankMask.full([RANK * (module.block >= mask_from) for module in spec.modules])
        self.plan = TrainPlan(
            server_round=1,
            seed=0,
            mask=mask,
            scales=(2.0,) * len(mask.ranks),
            train=LocalTraining(steps=STEPS, batch_size=SIZE, learning_rate=1e-3),
            sent=PARTS,
            terms={"slot-vote": {"budget": mask.count // 2}},
            report=frozenset({"slot-vote"}),
        )
        rng = np.random.default_rng(0)
        self.arrays = {part: rng.normal(0, 0.02, spec.length(part, mask)).astype(np.float32) for part in PARTS}
        rows = rng.permutation(len(data.pool))[: 2 * ROWS]
        own = self.learner.encode(data.pool.take(rows), settings.data.max_length)
        self.data = train.ClientData(own, Encoded([], []))

    def __call__(self) -> Any:
        return train.train(self.learner, self.data, self.plan, self.arrays, "0", simulated=True)

    def milliseconds(self) -> float:
        began = synchronised(self.device)
        self()
        return 1000 * (synchronised(self.device) - began)

    def bare(self) -> float:
        """The same steps without anything else: milliseconds, loading left out."""
        train.load(self.adapted, self.plan, self.arrays)
        optimizer, _ = train.make_optimizer(self.plan, self.adapted.parameters)
        lengths = [len(row) for row in self.data.train.ids]
        self.adapted.model.train(False)
        began = synchronised(self.device)
        for rows in train.batches(lengths, self.plan.train, np.random.default_rng(0)):
            batch = self.learner.batch(self.data.train, rows)
            outputs = TASK.outputs(self.learner, batch, self.adapted.below(batch))
            loss = TASK.losses(outputs, batch).sum() / TASK.counts(batch).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return 1000 * (synchronised(self.device) - began)


def quantised(args: argparse.Namespace) -> None:
    """A client's call by dtype: time, loss, memory; then a run of two rounds."""
    report = Report(args.out, "quantised", args.device)
    torch.set_num_threads(1)
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as root:
            path = folder(name, Path(root))
            calls: dict[str, Call] = {}
            memory: dict[str, tuple[float, float]] = {}
            times: dict[str, list[float]] = defaultdict(list)
            losses: dict[str, float] = {}
            for dtype in args.dtypes.split(","):
                try:
                    before = torch.cuda.memory_allocated() if args.device == "cuda" else 0
                    calls[dtype] = Call(path, dtype, args.device)
                    held = torch.cuda.memory_allocated() - before if args.device == "cuda" else 0
                    losses[dtype] = calls[dtype]().metrics["loss"]
                    peak = torch.cuda.max_memory_allocated() - before if args.device == "cuda" else 0
                    memory[dtype] = (held / 1e6, peak / 1e6)
                except Exception as error:
                    calls.pop(dtype, None)
                    report(model=name, dtype=dtype, problem=f"{type(error).__name__}: {error}"[:500])
            for _ in range(args.repeats):
                for dtype, call in calls.items():
                    times[dtype].append(call.milliseconds())
            for dtype in calls:
                report(
                    model=name,
                    dtype=dtype,
                    loss=losses[dtype],
                    **{"ms-per-step": statistics.median(times[dtype]) / STEPS, "mb-model": memory[dtype][0]},
                    **{"mb-peak": memory[dtype][1]},
                )
            calls.clear()
            for dtype in args.dtypes.split(",") if name != "bert-base" else ():
                if dtype not in ("int8", "int4"):
                    continue
                try:
                    settings = run_settings(path, dtype, args, **{"num-server-rounds": 2})
                    rounds = run_rounds(settings, ServerModel(settings))
                    report(model=name, dtype=dtype, run="2 rounds", losses=[r["loss"] for r in rounds])
                except Exception as error:
                    report(model=name, dtype=dtype, run="2 rounds", problem=f"{type(error).__name__}: {error}"[:500])
                session._resident.clear()


# -- where the time goes -----------------------------------------------------------------------------------------------
def phases(call: Call, repeats: int) -> dict[str, float]:
    """Milliseconds of one call by phase, the device waited for at each phase's ends (so their sum is more than the call)."""
    spent: dict[str, float] = defaultdict(float)

    def timed(function: Callable, name: str) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = synchronised(call.device)
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += 1000 * (synchronised(call.device) - began)

        return wrapper

    places: list[tuple[Any, str, str]] = [
        (train, "load", "load"),
        (train.Trainee, "_collect", "collect and vote"),
        (train, "count_flops", "count FLOPs"),
        (train, "make_optimizer", "make the optimiser"),
        (train, "backward", "forward and backward"),
        (train.Trainee, "begin", "begin"),
        (train.Trainee, "before_update", "before_update (score)"),
        (train.Trainee, "update", "update (all after the steps)"),
        (Learner, "batch", "pad and copy a batch"),
        (torch.optim.AdamW, "step", "optimiser's step"),
    ]
    with ExitStack() as stack:
        for owner, attribute, name in places:
            stack.enter_context(mock.patch.object(owner, attribute, timed(getattr(owner, attribute), name)))
        for _ in range(repeats):
            call()
    return {name: value / repeats for name, value in spent.items()}


def without(call: Call, repeats: int) -> dict[str, float]:
    """Milliseconds of a call as it is and with one thing at a time left out, interleaved; and of the bare steps."""
    nothing: list[Any] = []
    no_sync = [mock.patch.object(step, "clock", lambda device: time.perf_counter())]
    ways: dict[str, list[Any]] = {
        "as it is": nothing,
        "no synchronising in a step": no_sync,
        "no score": [mock.patch.object(SlotVote, "after_backward", lambda self: None)],
        "no FLOPs counted": [mock.patch.object(train, "count_flops", lambda *args: {})],
    }
    times: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):
        for way, patches in ways.items():
            with ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(patch)
                found = call.milliseconds()
            if repeat:
                times[way].append(found)
        bare = call.bare()
        if repeat:
            times["bare steps"].append(bare)
    return {way: statistics.median(found) for way, found in times.items()}


def first_of_a_mask(call: Call) -> tuple[float, float]:
    """Milliseconds of a call whose mask's FLOPs are to be counted, and of the next."""
    call.adapted.costs.clear()
    return call.milliseconds(), call.milliseconds()


def traced(call: Call, out: Path) -> dict[str, Any]:
    """torch.profiler over one call."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if call.device == "cuda" else [])
    with profile(activities=activities) as found:
        wall = call.milliseconds()
    averages = found.key_averages()
    cuda = "CUDA"
    there = [e for e in found.events() if cuda in str(e.device_type) and not getattr(e, "is_user_annotation", False)]
    kernels = [e for e in there if not e.name.startswith(("Mem", "ProfilerStep", "Optimizer."))]
    copies = [e for e in there if e.name.startswith("Mem")]
    busy = sum(e.device_time for e in [*kernels, *copies]) / 1000
    counts = {e.key: e.count for e in averages}
    names = (
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
        "cudaMemcpyAsync",
        "cudaMemsetAsync",
    )
    names += ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::item", "aten::_local_scalar_dense", "aten::to")
    names += ("aten::copy_", "aten::clone", "aten::_to_copy")
    by_kernel: dict[str, float] = defaultdict(float)
    for e in kernels:
        by_kernel[e.name[:90]] += e.device_time / 1000
    waits = {e.key: e.self_cpu_time_total / 1000 for e in averages if e.key.startswith("cuda") and e.self_cpu_time_total > 200}
    waits |= {f"calls of {name}": count for name, count in counts.items() if name.startswith(("cuda", "cu"))}
    top = sorted(averages, key=lambda e: -e.self_cpu_time_total)[:25]
    (out / f"ops-{call.dtype}.txt").write_text(
        averages.table(sort_by="self_cpu_time_total", row_limit=40)
        + (averages.table(sort_by="self_device_time_total", row_limit=40) if call.device == "cuda" else "")
    )
    return {
        "ms-wall-traced": wall,
        "ms-gpu-busy": busy,
        "kernels": len(kernels),
        "copies": dict(Counter(e.name for e in copies)),
        "counts": {name: counts[name] for name in names if name in counts},
        "ms-waits": waits,
        "top-kernels-ms": dict(sorted(by_kernel.items(), key=lambda item: -item[1])[:12]),
        "top-ops-self-cpu-ms": {e.key: [round(e.self_cpu_time_total / 1000, 2), e.count] for e in top},
    }


def whole_profile(path: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """CProfile over a run's rounds after a first run: seconds by function of ours, cumulative."""
    settings = run_settings(path, dtype, args)
    model = ServerModel(settings)
    run_rounds(settings, model)
    profiler = cProfile.Profile()
    began = synchronised(args.device)
    profiler.enable()
    rounds = run_rounds(settings, model)
    profiler.disable()
    wall = synchronised(args.device) - began
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    names = {
        f"{Path(file).name}:{name}": (cumulative, calls) for (file, _, name), (_, calls, _, cumulative, _) in stats.items()
    }
    top = sorted(names.items(), key=lambda item: -item[1][0])[:70]
    own = sorted(
        ((f"{Path(file).name}:{name}", total, calls) for (file, _, name), (_, calls, total, _, _) in stats.items()),
        key=lambda item: -item[1],
    )[:25]
    method = strategies.find(settings.method)(settings, model)
    weights = method.weights(method.start())
    before = time.perf_counter()
    model.evaluate(weights)
    return {
        "seconds-wall": wall,
        "clients": sum(r["clients"] for r in rounds),
        "cumulative": {name: [round(seconds, 3), calls] for name, (seconds, calls) in top},
        "self": {name: [round(seconds, 3), calls] for name, seconds, calls in own},
        "seconds-server-evaluation": time.perf_counter() - before,
        "server-evaluates-on": str(model.adapted.device),
    }


def profiles(args: argparse.Namespace) -> None:
    """All of the above by model and dtype."""
    report = Report(args.out, "profile", args.device)
    torch.set_num_threads(1)
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as root:
            path = folder(name, Path(root))
            for dtype in args.dtypes.split(","):
                common = {"model": name, "dtype": dtype}
                call = Call(path, dtype, args.device)
                for _ in range(2):
                    call()
                parts: dict[str, Callable[[], Any]] = {
                    "without": lambda call=call: without(call, args.repeats),
                    "phases": lambda call=call: phases(call, args.repeats),
                    "first-of-a-mask": lambda call=call: first_of_a_mask(call),
                    "trace": lambda call=call: traced(call, args.out),
                }
                if name != "bert-base":
                    parts["run"] = lambda path=path, dtype=dtype: whole_profile(path, dtype, args)
                for part, measured in parts.items():
                    try:
                        report(**common, part=part, found=measured())
                    except Exception as error:
                        report(**common, part=part, problem=f"{type(error).__name__}: {error}"[:500])
                session._resident.clear()


# -- the table at the end ----------------------------------------------------------------------------------------------
def lines_of(path: Path) -> list[dict[str, Any]]:
    """A file's whole lines: the last one may be cut off where its step had no more time."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{path.name}: a line that was cut off is left out: {line[:60]!r}")
    return found


def table(args: argparse.Namespace) -> None:
    """What was found, short."""
    print("\n== client-rounds per second ==")
    for line in lines_of(args.out / "throughput.jsonl"):
        for rounds in ("", "after-first-"):
            ours, bare, plain = (line[f"per-second-{rounds}{way}"] for way in ("ours", "bare", "plain"))
            print(
                f"{line['model']:10} {line['dtype']:9} {rounds or 'all':12} ours {ours:8.3f}  bare {bare:8.3f}"
                f"  plain {plain:8.3f}  ours/bare {ours / bare:5.2f}  ours/plain {ours / plain:6.2f}"
            )
    print("== clients together: ms a client's step ==")
    for line in lines_of(args.out / "together.jsonl"):
        print(
            f"{line['model']:10} {line['dtype']:9} {line['clients']} clients  alone {line['ms-alone']:8.2f}"
            f"  together {line['ms-together']:8.2f}  gain {line['gain']:5.2f}"
        )
    print("== whole runs: ms a client-round, median of repeats ==")
    runs: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines_of(args.out / "together-runs.jsonl"):
        runs[line["model"], line["dtype"]][line["together"]].append(line["ms-per-client-round"])
    for (model, dtype), found in runs.items():
        medians = {count: statistics.median(values) for count, values in found.items()}
        shown = "  ".join(f"{count}: {ms:8.1f} ({medians[1] / ms:4.2f}x)" for count, ms in medians.items() if 1 in medians)
        print(f"{model:10} {dtype:9} {shown}")
    print("== number types ==")
    for line in lines_of(args.out / "quantised.jsonl"):
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items() if key != "card"})
    print("== profile ==")
    for line in lines_of(args.out / "profile.jsonl"):
        found = line.get("found", line.get("problem"))
        if line["part"] in ("without", "phases") and isinstance(found, dict):
            found = {name: round(value, 1) for name, value in found.items()}
        elif line["part"] == "trace" and isinstance(found, dict):
            found = {k: found[k] for k in ("ms-wall-traced", "ms-gpu-busy", "kernels", "copies", "counts", "ms-waits")}
        elif line["part"] == "run" and isinstance(found, dict):
            found = {k: found[k] for k in ("seconds-wall", "clients", "seconds-server-evaluation", "server-evaluates-on")}
        print(line["model"], line["dtype"], line["part"], found)


def main() -> None:
    """Parse the command line and do one step."""
    steps = {"together": whole_together, "quantised": quantised, "profile": profiles, "table": table}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=sorted(steps))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--models", default="minilm,bert-base")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    steps[args.step](args)
    if Report.problems:
        sys.exit(f"{Report.problems} lines have a problem: not everything was measured")


if __name__ == "__main__":
    main()
