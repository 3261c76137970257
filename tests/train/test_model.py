"""The compact model is Hugging Face's Qwen3, in training form, in sampling form, and as committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from thinkserve.train.export import export, load, to_hf
from thinkserve.train.model import CONTEXT, SHAPES, Model, Shape, rotations

MODELS = Path(__file__).resolve().parents[2] / "models"
TOKENIZER = Tokenizer.from_file(str(MODELS / "arith-small" / "tokenizer.json"))
TINY = Shape("tiny", hidden=64, layers=2, feed_forward=96, heads=4, kv_heads=2, head_dim=16)


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, *rotations(ids.shape[1], model.shape.head_dim))
        return found


def tiny(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(TINY).eval()


def test_the_model_is_qwen3() -> None:
    """The same weights give the same logits in transformers' Qwen3, far along the context too."""
    model = tiny()
    ids = torch.randint(0, TINY.vocabulary, (2, 700), generator=torch.Generator().manual_seed(1))
    hf = to_hf(model.state_dict(), TINY, TOKENIZER).eval()
    with torch.no_grad():
        expected = hf(ids).logits
    torch.testing.assert_close(logits(model, ids), expected, atol=2e-4, rtol=1e-3)


def test_a_position_sees_nothing_of_the_future() -> None:
    """Changing a later token leaves all earlier logits as they were."""
    model = tiny()
    ids = torch.randint(0, TINY.vocabulary, (1, 40), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[0, 25] = (other[0, 25] + 1) % TINY.vocabulary
    torch.testing.assert_close(logits(model, ids)[:, :25], logits(model, other)[:, :25])
    assert not torch.allclose(logits(model, ids)[:, 25:], logits(model, other)[:, 25:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_compute_the_same() -> None:
    """What the loop trains on a machine with a compiler: the same logits, whatever the size of the batch."""
    model, compiled = tiny(), tiny()
    for layer in compiled.blocks():
        torch.nn.Module.compile(layer, dynamic=True)
    for size in ((2, 40), (3, 25)):
        ids = torch.randint(0, TINY.vocabulary, size)
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids), atol=1e-4, rtol=1e-3)


def test_an_export_is_complete_and_keeps_the_card(tmp_path: Path) -> None:
    """A second export replaces the weights, keeps card and figures, and leaves nothing half-written behind."""
    folder = tmp_path / "tiny"
    export(tiny(5).state_dict(), TINY, TOKENIZER, folder)
    (folder / "README.md").write_text("card")
    export(tiny(6).state_dict(), TINY, TOKENIZER, folder)
    assert "card" == (folder / "README.md").read_text()
    assert ["tiny"] == [entry.name for entry in tmp_path.iterdir()]
    stored = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(tiny(6).state_dict()["layers.0.mlp.up_proj.weight"].bfloat16(), stored)


@pytest.mark.parametrize("size", sorted(SHAPES))
def test_the_committed_model_is_the_family_s(size: str) -> None:
    """Loads in transformers, gives our model's logits, stops at the end of a turn, and is stored in bf16."""
    folder = MODELS / SHAPES[size].name
    assert {torch.bfloat16} == {weight.dtype for weight in load_file(folder / "model.safetensors").values()}
    model = load(folder)[0].eval()
    assert SHAPES[size] == model.shape
    ids = torch.tensor([TOKENIZER.encode("<|im_start|>user\nCompute 12+5.<|im_end|>\n").ids])
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = hf(ids).logits
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-3, rtol=1e-3)
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert ["Qwen3ForCausalLM"] == config["architectures"]
    assert CONTEXT == config["max_position_embeddings"]
    assert TOKENIZER.token_to_id("<|im_end|>") == config["eos_token_id"] == generation["eos_token_id"]


def test_the_sizes_are_as_announced() -> None:
    """One to two million parameters in small, four to twelve in large; at most 40 MB committed in all."""
    counts = {size: sum(p.numel() for p in Model(shape).parameters()) for size, shape in SHAPES.items()}
    assert 1e6 <= counts["small"] <= 2e6
    assert 4e6 <= counts["large"] <= 12e6
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) <= 40e6
