"""What a GPU computes is what a processor does, to rounding: logits, training, kept states, shrinking, whole runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import CONFIGS, TASKS, backbone, mean_loss, random_arrays, random_batch
from runs_helper import config, start

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.client import session
from fedara_flwr.client.capacity import clock, free_memory
from fedara_flwr.model.ranks import RankMask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RANK = 3
TASK = TASKS["classification"]
ALL = frozenset({"B", "E", "A", "head"})
architectures = pytest.mark.parametrize("name", sorted(CONFIGS))


def loaded(path, device, dtype="float32", cache="off", lowest=0):
    adapted = AdaptedModel(backbone(path, dtype=dtype, device=device), cache, 64)
    mask = RankMask.full([RANK * (module.block >= lowest) for module in adapted.spec.modules])
    adapted.load(random_arrays(adapted.spec, mask), mask, (2.0,) * len(mask.ranks), ALL)
    return adapted


def on(adapted):
    return {name: values.to(adapted.device) for name, values in random_batch().items()}


def losses(adapted, steps=4):
    optimizer = torch.optim.AdamW([p for part in sorted(ALL) for p in adapted.parameters(part)], lr=1e-2, fused=True)
    batch, found = on(adapted), []
    for _ in range(steps):
        loss = mean_loss(TASK, adapted.outputs(batch, adapted.below(batch)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@architectures
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.06)])
def test_logits_and_training(tiny_models, name, dtype, bound):
    """bfloat16 as in test_quantised: some thirty roundings in a row, half of what they could add up to."""
    gpu, cpu = loaded(tiny_models[name], "cuda", dtype), loaded(tiny_models[name], "cpu", dtype)
    with torch.no_grad():
        found, expected = gpu.outputs(on(gpu)).logits.float(), cpu.outputs(on(cpu)).logits.float()
    assert found.device.type == "cuda" and found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=bound * float(expected.abs().max()))
    np.testing.assert_allclose(losses(gpu), losses(cpu), rtol=bound)


@architectures
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.06)])
def test_kept_states(tiny_models, name, dtype, bound):
    """A step from what is kept is one of all blocks; what is kept stays on the GPU."""
    adapted = loaded(tiny_models[name], "cuda", dtype, "exact", lowest=1)
    batch = on(adapted)
    with torch.no_grad():
        whole = adapted.outputs(batch).logits
        for _ in range(2):
            below = adapted.below(batch)
            assert below is not None and below.device.type == "cuda"
            atol = bound * float(whole.abs().max())
            torch.testing.assert_close(adapted.outputs(batch, below).logits, whole, rtol=0, atol=atol)
    assert losses(adapted)[-1] < losses(loaded(tiny_models[name], "cuda", dtype, lowest=1), 1)[0]


def test_shrinking_and_back(tiny_models):
    """What comes is what is collected, whatever was there; a dead module gives its place back."""
    adapted = loaded(tiny_models["bert"], "cuda")
    rng = np.random.default_rng(0)
    full = adapted.mask
    for mask in (full, full.keep(rng.random(full.count) < 0.3), full.keep(np.arange(full.count) > 0.6 * full.count), full):
        arrays = random_arrays(adapted.spec, mask, seed=int(mask.count))
        adapted.load(arrays, mask, (2.0,) * len(mask.ranks), ALL)
        found = adapted.collect(ALL)
        assert all(np.array_equal(found[part], arrays[part]) for part in ALL)
        assert {p.device.type for part in ALL for p in adapted.parameters(part)} == {"cuda"}
        kinds = [type(getattr(*place)).__name__ == "LowRankLinear" for place in adapted._places]
        assert kinds == [count > 0 for count in mask.alive.tolist()]
        mean_loss(TASK, adapted.outputs(on(adapted)), on(adapted)).backward()
        assert all(p.grad is not None for part in ALL for p in adapted.parameters(part))


def test_what_a_gpu_says_of_itself(tiny_models):
    adapted = loaded(tiny_models["bert"], "cuda")
    assert 0 < free_memory(adapted.device) <= torch.cuda.get_device_properties(0).total_memory
    assert clock(adapted.device) <= clock(adapted.device)


def finished(flat, device):
    session._resident.clear()
    strategy = start(flat | {"run.device": device})
    session._resident.clear()
    return strategy


def apart(first, second, part):
    found, expected = first.state.arrays[part], second.state.arrays[part]
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_two_rounds_is_the_processors(tiny_bert, dtype):
    """Adam's first step of a number is its gradient's sign, which rounding turns where the gradient is nearly 0."""
    changes = {"num_server_rounds": 2, "fedara__warmup_rounds": 0, "fedara__final_rounds": 0, "model__dtype": dtype}
    flat = config(tiny_bert, **changes)
    gpu, cpu = finished(flat, "cuda"), finished(flat, "cpu")
    rounds = [[line for line in one.lines if line["type"] == "round"] for one in (gpu, cpu)]
    assert [line["good"] for line in rounds[0]] == [line["good"] for line in rounds[1]] == [3, 3]
    if dtype == "float32":
        assert gpu.state.mask == cpu.state.mask
        assert all(apart(gpu, cpu, part) < 0.01 for part in ("B", "A", "head"))
    else:
        assert apart(gpu, cpu, "head") < 0.1


@pytest.mark.parametrize("together", [2, 3])
def test_clients_together_on_a_gpu(tiny_bert, together):
    flat = config(tiny_bert, num_server_rounds=2, fedara__warmup_rounds=0, fedara__final_rounds=0)
    expected, found = finished(flat, "cuda"), finished(flat | {"run.together": together}, "cuda")
    assert found.state.mask == expected.state.mask
    assert all(apart(found, expected, part) < 0.01 for part in ("B", "A", "head"))
