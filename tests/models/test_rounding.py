"""Weights in a lower precision: what rounding to nearest keeps of an update, and rounding that keeps all of it on average."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from finetuning.models.rounding import (
    choose_rounding,
    describe_plan,
    plan_loading,
    plan_rounding,
    round_loaded,
    round_weights,
)
from finetuning.runs import write_json

# A step of bfloat16 above 1 is 1/128, and one of float16 is 1/1024.
BEFORE = {"a": [1.0] * 5, "b": [[1.0, 2.0]] * 3}
UPDATE = {
    "a": [41 / 4096, 20 / 4096, 8 / 4096, -13 / 4096, 1 / 4096],
    "b": [[27 / 4096, 16 / 4096], [3 / 4096, 0.0], [33 / 4096, 45 / 4096]],
}


def by_hand(num_bits: int) -> float:
    """The projection in plain Python: each weight to the nearest multiple of its step, the even one of two as near."""
    kept = whole = 0.0
    pairs = zip([*BEFORE["a"], *sum(BEFORE["b"], [])], [*UPDATE["a"], *sum(UPDATE["b"], [])], strict=True)
    for before, update in pairs:
        after = before + update
        step = 2.0**-num_bits * (0.5 if after < 1 else 2 if after >= 2 else 1)
        kept += (round(after / step) * step - before) * update
        whole += update**2
    return kept / whole


def tensors(*parts: dict) -> dict[str, torch.Tensor]:
    return {name: sum(torch.tensor(part[name]) for part in parts) for name in ("a", "b")}


@pytest.fixture
def base(tmp_path) -> str:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"a": tensors(BEFORE)["a"].bfloat16()}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": tensors(BEFORE)["b"], "resized": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")
    return str(folder)


def measure_on_a_rank(rank: int, num_ranks: int, base: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,))
    weights = {name: distribute_tensor(whole, mesh, [Shard(0)]) for name, whole in tensors(BEFORE, UPDATE).items()}
    plan = plan_rounding(weights.items(), (base, None), "bfloat16", "auto")
    write_json(ROOT / folder / f"{rank}.json", plan)
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])  # of four, one has no row of either tensor
def test_what_is_kept_is_the_projection_by_hand_on_any_number_of_ranks(base, tmp_path, num_ranks):
    expected = {"bfloat16": pytest.approx(by_hand(7), rel=1e-6), "float16": pytest.approx(by_hand(10), rel=1e-6)}
    assert 0.5 < by_hand(7) < 1.5 and by_hand(7) != pytest.approx(by_hand(10), rel=0.01)
    if num_ranks == 1:
        assert plan_rounding(tensors(BEFORE, UPDATE).items(), (base, None), "bfloat16", "auto")["kept"] == expected
        return
    arguments = (num_ranks, base, str(tmp_path))
    multiprocessing.start_processes(measure_on_a_rank, arguments, num_ranks, start_method="fork")
    plans = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    assert [plan["kept"] for plan in plans] == [expected] * num_ranks


def test_tensors_that_the_base_has_not_in_this_shape_are_left_out_and_said(base):
    weights = tensors(BEFORE, UPDATE)
    plan = plan_rounding(
        {**weights, "resized": torch.ones(4), "new": torch.ones(1)}.items(), (base, None), "float32", "auto"
    )
    assert plan["left_out"] == ["resized", "new"] and plan["kept"]["bfloat16"] == pytest.approx(by_hand(7), rel=1e-6)
    assert "(without 2 tensors that the base has not in this shape)" in describe_plan(plan)
    unknown = plan_rounding(weights.items(), ("nobody/nothing", None), "bfloat16", "auto")
    assert unknown["kept"] == {} and unknown["rounding"] == "nearest" and "an unknown share" in describe_plan(unknown)
    assert plan_rounding(tensors(BEFORE).items(), (base, None), "float32", "auto")["kept"] == {}  # nothing was learned


def test_auto_is_stochastic_where_nearest_keeps_too_little():
    for asked, dtype, share, expected in (
        ("auto", "bfloat16", 0.949, "stochastic"),
        ("auto", "bfloat16", 0.951, "nearest"),
        ("nearest", "bfloat16", 0.5, "nearest"),
        ("stochastic", "bfloat16", 1.0, "stochastic"),
        ("stochastic", "float32", 0.5, None),
    ):
        assert choose_rounding(asked, dtype, {"bfloat16": share}) == expected
    warned = {"dtype": "float32", "rounding": None, "kept": {"bfloat16": 0.899, "float16": 0.999998}, "left_out": []}
    assert "keeps 89.9% in bfloat16 and 100% in float16; warning:" in describe_plan(warned)
    assert "warning" not in describe_plan(warned | {"kept": {"bfloat16": 0.9}})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(dtype):
    weights = torch.randn(64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 64)
    drawn = torch.stack([round_weights(weights, dtype, f"layers.{i}", "stochastic") for i in range(1000)]).double()
    step = torch.finfo(dtype).eps * 2.0 ** weights.abs().log2().floor().double()
    below = (weights.double() / step).floor() * step
    assert ((drawn - below) / step).unique().tolist() == [0.0, 1.0]
    up = (weights.double() - below) / step  # the probability of the upper neighbour
    deviation = ((drawn - below).mean(dim=0) / step - up) / (up * (1 - up) / 1000).sqrt().clamp(min=1e-9)
    assert deviation.abs().max() < 4 and deviation.std() == pytest.approx(1, abs=0.25)
    assert torch.equal(drawn[7].to(dtype), round_weights(weights, dtype, "layers.7", "stochastic"))


def test_what_has_no_neighbour_survives_stochastic_rounding():
    largest = torch.finfo(torch.float32).max
    kept = torch.tensor([0.0, -0.0, 1.5, float("inf"), -float("inf"), float("nan"), -float("nan")])
    for name in map(str, range(50)):
        rounded = round_weights(kept, torch.bfloat16, name, "stochastic").float()
        assert torch.equal(rounded.nan_to_num(7), kept.nan_to_num(7)) and rounded.signbit().tolist()[:2] == [
            False,
            True,
        ]
        most = round_weights(torch.tensor([largest, -largest]), torch.bfloat16, name, "stochastic").float()
        assert most.isfinite().all() and most[0] > 3.38e38 and most[1] < -3.38e38
    assert torch.equal(round_weights(kept[:3].bfloat16(), torch.float16, "x", "stochastic"), kept[:3].half())


def test_a_model_in_float32_is_loaded_as_its_weights_were_rounded(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo/model", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-5 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    base = (str(ROOT / "demo/model"), None)
    plan = plan_loading(str(tmp_path), base, "bfloat16", "auto")
    assert plan["rounding"] == "stochastic" and plan["kept"]["bfloat16"] < 0.5 and plan["left_out"] == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    round_loaded(loaded, str(tmp_path))
    weights, state = load_file(tmp_path / "model.safetensors"), loaded.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(state[name], round_weights(tensor, torch.bfloat16, name, "stochastic")), name
    learned = plan_rounding(((name, state[name].float()) for name in weights), base, "float32", "auto")
    assert learned["kept"]["bfloat16"] == pytest.approx(1)  # what stands in bfloat16 loses nothing more

    # what was recorded beside the weights is believed, and nothing is measured where nothing is rounded
    assert plan_loading(str(tmp_path), base, "float32", "auto") == plan_loading(base[0], base, "float32", "auto")
    write_json(
        tmp_path / "precision.json", {"dtype": "float32", "rounding": None, "kept": {"bfloat16": 0.96}, "left_out": []}
    )
    assert plan_loading(str(tmp_path), base, "bfloat16", "auto")["rounding"] == "nearest"
    loaded.save_pretrained(tmp_path)
    for rounding, kept in (("stochastic", {}), ("nearest", {"bfloat16": 0.3})):
        shares = {"bfloat16": 0.3, "float16": 0.9}  # the second says nothing of what stands in bfloat16
        record = {"dtype": "bfloat16", "rounding": rounding, "kept": shares, "left_out": []}
        write_json(tmp_path / "precision.json", record)
        plan = plan_loading(str(tmp_path), base, "bfloat16", "auto")
        assert plan["rounding"] is None and plan["kept"] == kept


@pytest.mark.parametrize("base", ["/no/such/folder", "no such model", "org/not-on-this-machine"])
def test_a_base_that_is_gone_leaves_the_share_unknown_and_ends_nothing(base):
    """Step 1 measures at every save, and a run must not be lost with the base that it started from."""
    plan = plan_rounding([("weight", torch.ones(3))], (base, None), "bfloat16", "auto")
    assert (plan["kept"], plan["rounding"], plan["left_out"]) == ({}, "nearest", ["weight"])
    assert "an unknown share" in describe_plan(plan)


def test_a_record_that_lacks_its_own_dtype_is_no_traceback(tmp_path):
    record = {"dtype": "bfloat16", "rounding": "nearest", "kept": {"float16": 0.5}, "left_out": []}
    write_json(tmp_path / "precision.json", record)
    assert plan_loading(str(tmp_path), ("base", None), "bfloat16", "auto")["kept"] == {}
