"""What users do to a model besides calling it: half, offload, export, adapters trained in several processes."""

from __future__ import annotations

import copy
import os
import weakref
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from conftest import tiny, token_ids, training_losses
from torch import distributed, multiprocessing

import tqw
from tqw.layer import is_lent


def quantized(name: str = "llama"):
    model = tiny(name)
    tqw.quantize_model(model, tqw.QuantConfig(group_size=32))
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits


def test_half_changes_norms_and_leaves_the_codes():
    model = quantized()
    expected, before = logits(model), copy.deepcopy(model.state_dict())
    model.half()
    for name, tensor in model.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, tqw.QuantizedLinear):
            assert torch.equal(tensor, before[name]), name
        else:
            assert tensor.dtype == torch.float16, name
    assert (logits(model).float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_offloads_and_the_logits_stay(where, tmp_path):
    model = quantized()
    expected = logits(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight.device.type == "meta"
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)  # and again: nothing of the first call is left over


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_accelerate_takes_away_is_gone(name, tmp_path, monkeypatch):
    """Else a model larger than a GPU would stay there after its first call."""
    model = quantized(name)
    expected = logits(model)  # whatever layers keep, they keep it from here on
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    brought: list[weakref.ref[torch.Tensor]] = []
    bring = accelerate.hooks.set_module_tensor_to_device

    def noting(module, tensor_name, device, **options):
        bring(module, tensor_name, device, **options)
        tensor = module._parameters.get(tensor_name)
        if tensor is not None and tensor.device.type != "meta":
            brought.append(weakref.ref(tensor))

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", noting)
    assert torch.equal(logits(model), expected)
    assert len(brought) > 40
    assert all(tensor() is None for tensor in brought)


def test_only_offloaded_layers_are_lent():
    """Layers that a device map merely places on a GPU have hooks of the same kind."""
    layer = quantized().get_submodule("model.layers.0.mlp.up_proj")
    assert not is_lent(layer)
    for offload in (False, True):
        hook = accelerate.hooks.AlignDevicesHook(
            execution_device="cpu", offload=offload, weights_map=layer.state_dict()
        )
        accelerate.hooks.add_hook_to_module(layer, hook, append=True)
        assert is_lent(layer) == offload


@pytest.mark.parametrize("how", ["quantized", "loaded"])
def test_a_model_made_in_inference_mode_is_an_ordinary_one(how, tmp_path):
    dense = tiny("llama")
    dense.save_pretrained(tmp_path / "float")
    with torch.inference_mode():
        if how == "quantized":
            tqw.quantize_model(dense, tqw.QuantConfig(group_size=32, embedding=8, lm_head=8))
            model = dense
        else:
            tqw.quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", calibrate="none")
            model = tqw.load(tmp_path / "out")
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    losses = training_losses(adapted, token_ids())
    assert losses[-1] < losses[0]


def test_a_whole_model_is_exported():
    model = quantized()
    program = torch.export.export(model, (), {"input_ids": token_ids(), "use_cache": False}, strict=False)
    assert any("tqw.linear" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        found = program.module()(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)


def _adapter():
    torch.manual_seed(0)
    return peft.get_peft_model(
        quantized(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True)
    )


def _train(rank: int, how: str, folder: str) -> None:
    """One of two processes; both see the same batch, so the losses must be those of one process alone."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{how}", rank=rank, world_size=2)
    model = _adapter()
    codes = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight.clone()
    if how == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.get_submodule("base_model.model.model.layers").children():
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    losses = training_losses(wrapped, token_ids())
    after = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight
    whole = after.full_tensor() if hasattr(after, "full_tensor") else after
    if rank == 0:
        torch.save({"losses": losses, "kept": torch.equal(whole, codes)}, Path(folder) / f"{how}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # torch's reducer would wait for gloo's thread with the lock that this thread may wait for


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_adapters_train_on_a_frozen_base_in_two_processes(how, tmp_path):
    if how == "fsdp2" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        pytest.skip("fully_shard of torch 2.9 and 2.11 takes no integer parameters")
    multiprocessing.spawn(_train, (how, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / f"{how}.pt")
    expected = training_losses(_adapter(), token_ids())
    assert found["losses"] == pytest.approx(expected, rel=1e-3)
    assert found["losses"][-1] < found["losses"][0]
    assert found["kept"]
