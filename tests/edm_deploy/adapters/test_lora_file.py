import json

import pytest
import torch
from safetensors.torch import save_file

from edm_deploy.adapters.lora_file import LoraScaling, read_lora_file, scaling_of
from edm_deploy.errors import ArtifactError, InputError

TENSORS = {"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(4, 2)}


def test_a_file_a_folder_of_diffusers_and_one_of_peft_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "style.safetensors")
    assert read_lora_file(tmp_path / "style.safetensors").name == "style.safetensors"
    assert set(read_lora_file(tmp_path).tensors) == set(TENSORS)
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    found = read_lora_file(tmp_path)  # of several files, the one with PEFT's name
    assert found.scaling[""].factor("a", 2) == 4


def test_the_header_that_diffusers_writes_is_read(tmp_path):
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.r": 2, "text_encoder.r": 4})}
    save_file(TENSORS, tmp_path / "x.safetensors", metadata=header)
    assert read_lora_file(tmp_path / "x.safetensors").scaling["unet."].factor("a", 2) == 3


def test_the_factor_is_alpha_by_rank_by_layer_and_from_the_file_first():
    scaling = scaling_of({"lora_alpha": 8, "r": 4, "alpha_pattern": {"to_q": 2}}, "x")
    assert (scaling.factor("b.to_k", 4), scaling.factor("b.to_q", 4), scaling.factor("xto_q", 4)) == (2, 0.5, 2)
    assert scaling.factor("b.to_k", 4, alpha=1.0) == 0.25
    assert scaling_of({"lora_alpha": 8, "r": 4, "use_rslora": True}, "x").factor("a", 4) == 4
    assert LoraScaling().factor("a", 4) == 1
    assert scaling_of({"peft_type": "LOKR", "alpha": 8, "r": 4}, "x").factor("a", None) == 2


def test_what_is_no_lora_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(ArtifactError, match=r"nothing\.safetensors does not exist; expected a LoRA"):
        read_lora_file(tmp_path / "nothing.safetensors")
    with pytest.raises(ArtifactError, match=r"holds 0 LoRA files \(none\), expected one"):
        read_lora_file(tmp_path)
    (tmp_path / "old.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="is a pickle, which may hold code; expected safetensors"):
        read_lora_file(tmp_path / "old.bin")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with pytest.raises(ArtifactError, match=r"bad\.safetensors is no safetensors file"):
        read_lora_file(tmp_path / "bad.safetensors")
    save_file(TENSORS, tmp_path / "odd.safetensors", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(ArtifactError, match="header lora_adapter_metadata that is no JSON"):
        read_lora_file(tmp_path / "odd.safetensors")
    for config, message in (({"use_dora": True}, "x is a DoRA"), ({"peft_type": "IA3"}, "x is an adapter of type IA3; expected LORA")):
        with pytest.raises(InputError, match=message):
            scaling_of(config, "x")
