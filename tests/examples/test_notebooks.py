"""The notebooks of `examples/notebooks`: their code as plain Python on a tiny model, and in a kernel if one exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bfpo.policy.save import save_policy

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of random weights whose tokens are bytes, so that it reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), **sizes, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    folder = tmp_path_factory.mktemp("chat")
    save_policy(LlamaForCausalLM(config), tokenizer, folder)
    return folder


def cells_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def environment(path: Path, chat_model: Path, tmp_path: Path) -> dict[str, str]:
    return {"BFPO_MODEL": str(chat_model), "BFPO_OUT": str(tmp_path / path.stem), "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_runs(path, chat_model, tmp_path, monkeypatch, capsys):
    for name, value in environment(path, chat_model, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells_of(path)):
        exec(compile(cell, f"{path.name}[{number}]", "exec"), space)
    shown = capsys.readouterr().out
    said = {"loss": "order         [1, 3, 4, 2]", "align": "bfpo: ", "judge": "harmless: +"}
    assert said[path.stem] in shown
    if path.stem == "align":  # of main pairs (target -1) and buffer pairs (target 1/2), as the text says
        rows = [json.loads(line) for line in (tmp_path / "align" / "bfpo" / "metrics.jsonl").read_text().splitlines()]
        assert rows[0]["main/loss"] == pytest.approx(100, rel=1e-3)
        assert rows[0]["buffer/loss"] == pytest.approx(25, rel=1e-3)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_begins_with_a_title(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["source"][0].startswith("# ")
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel(path, chat_model, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for name, value in environment(path, chat_model, tmp_path).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
