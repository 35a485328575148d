"""The roofline command: its JSON, its table and figure, and its answers to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import REPOSITORY
from uvm_kv.commands.roofline import main

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one JSON object that the command prints."""
    assert main(["json=true", "figure=false", *arguments]) == 0
    out, err = capsys.readouterr()
    assert not err
    parsed: dict[str, Any] = json.loads(out)
    return parsed


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that bad input is answered with."""
    assert main(["figure=false", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_json_holds_the_operators_and_their_sums(capsys: pytest.CaptureFixture[str]) -> None:
    got = answer(capsys, "model=llama2_7b", "hardware=a6000", "counting=llm_viewer")
    assert (got["model"], got["hardware"], got["stage"], got["counting"]) == (
        "llama2_7b",
        "a6000",
        "decode",
        "llm_viewer",
    )
    assert round(got["total_ms"], 3) == 18.637
    assert (got["batch_size"], got["sequence_length"], got["kv_bits"]) == (1, 2048, 16)
    operators = got["operators"]
    for total, each in (("total_ms", "time_ms"), ("total_ops", "ops"), ("total_bytes", "bytes")):
        assert got[total] == pytest.approx(sum(op["count"] * op[each] for op in operators))
    q_proj = next(op for op in operators if op["name"] == "q_proj")
    assert q_proj["count"] == 32
    assert q_proj["bound"] == "memory"
    assert q_proj["intensity"] == q_proj["ops"] / q_proj["bytes"]
    assert q_proj["attainable_ops_per_s"] == pytest.approx(q_proj["ops"] / (q_proj["time_ms"] * 1e-3))
    assert got["fits"] is True
    assert got["figure"] == []


def test_exact_is_the_default_and_slower_than_the_roof(capsys: pytest.CaptureFixture[str]) -> None:
    got = answer(capsys, "model=llama2_7b", "hardware=a6000", "stage=prefill", "batch_size=2")
    assert got["counting"] == "exact"
    assert all(0 < op["roof_share"] <= 1 for op in got["operators"])
    assert got["total_ms"] > answer(capsys, "model=llama2_7b", "hardware=a6000", "stage=prefill")["total_ms"]


def test_what_computes_nothing_has_no_attainable_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure=false"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "-" in rows["embedding"] and not any(cell.endswith("/s") for cell in rows["embedding"])
    assert any(cell.endswith("/s") for cell in rows["q_proj"])


def test_too_large_a_step_is_flagged_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    got = answer(capsys, "model=llama2_13b", "hardware=rtx3090")
    assert got["fits"] is False
    assert got["required_bytes"] > got["card_bytes"]
    assert "does not fit rtx3090" in got["warnings"][0]
    assert answer(capsys, "model=llama2_13b", "hardware=rtx3090", "weight_bits=4")["fits"] is True
    assert main(["model=llama2_13b", "hardware=rtx3090", "figure=false"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_a_hugging_face_config_is_the_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    ours = answer(capsys, "model=llama2_7b")
    for path in (folder, folder / "config.json"):
        got = answer(capsys, "model=hf", f"model.path={path}")
        assert got["model"] == "llama-2-7b"
        assert got["operators"] == ours["operators"]
    mqa = answer(capsys, "model=hf", f"model.path={folder}", "model.num_kv_heads=1")
    assert (mqa["num_kv_heads"], mqa["kv_bytes"]) == (1, ours["kv_bytes"] / 32)
    assert mqa["operators"] == answer(capsys, "model=llama2_7b", "model.num_kv_heads=1")["operators"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_local_experts": 8}, "num_local_experts=8, a mixture of experts, in config.json; only dense models"),
        ({"kv_lora_rank": 512}, "kv_lora_rank=512, latent attention, in config.json"),
        ({"num_hidden_layers": None}, "config.json has none of num_hidden_layers, n_layer"),
        ({"num_key_value_heads": 5}, "model.num_heads=32 is not a multiple of model.num_kv_heads=5"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ],
)
def test_configs_that_cannot_be_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | config))
    assert said in error(capsys, "model=hf", f"model.path={tmp_path}")


def test_other_ways_to_write_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A decoder nested in a larger model, multi-query said by a flag, and a model without a gate."""
    file = tmp_path / "nested.json"
    file.write_text(json.dumps({"model_type": "llava", "text_config": LLAMA}))
    assert answer(capsys, "model=hf", f"model.path={file}")["model"] == "nested"
    falcon = LLAMA | {"model_type": "falcon", "multi_query": True, "num_kv_heads": 32, "num_key_value_heads": None}
    file.write_text(json.dumps(falcon))
    got = answer(capsys, "model=hf", f"model.path={file}")
    assert got["num_kv_heads"] == 1
    assert "gate_proj" not in [op["name"] for op in got["operators"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hardware=rtx5090"], "hardware 'rtx5090' is unknown; did you mean rtx4090"),
        (["model=llama2_8b"], "model 'llama2_8b' is unknown; did you mean"),
        (["hardware.gpu.hbm_gb_per_s=0"], "hardware.gpu.hbm_gb_per_s=0.0; it must be a positive number"),
        (["hardware.gpu.tensor_tflop_per_s=-1"], "hardware.gpu.tensor_tflop_per_s=-1.0; it must be a positive number"),
        (["hardware.gpu.memory_bytes=0"], "hardware.gpu.memory_bytes=0; it must be a positive number"),
        (["batch_size=0"], "batch_size=0; it must lie between 1 and"),
        (["sequence_length=-1"], "sequence_length=-1; it must lie between 1 and"),
        (["batch_size=many"], "batch_size=many is not of the right type"),
        (["weight_bits=0"], "weight_bits=0; it must lie between 1 and 32"),
        (["activation_bits=64"], "activation_bits=64; it must lie between 1 and 32"),
        (["stage=train"], "stage 'train' is unknown; allowed: decode, prefill"),
        (["counting=exakt"], "counting 'exakt' is unknown; did you mean exact"),
        (["model=hf"], "model=hf needs a model folder"),
        (["model=hf", "model.path=/no/such/model"], "no config.json there"),
        (["model.num_kv_heads=5"], "model.num_heads=32 is not a multiple of model.num_kv_heads=5"),
        (["model.num_layers=0"], "model.num_layers=0; it must be at least 1"),
        (["model.hidden_size=10000000000000"], "it must be at most"),
        (["hardware.gpu.tensor_tflop_per_s=1e-300"], "overflows; a rate given under hardware is far too small"),
        (["hardware.sources.nothing=here"], "hardware.sources.nothing"),
        (["memory=device"], "key 'memory' is unknown"),
        (["batch_size=1,2"], "batch_size=1,2"),
        (["--verbose"], "--verbose is not an option"),
        (["batch_size"], "cannot be read; write key=value"),
    ],
)
def test_bad_input_is_answered_in_a_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert said in error(capsys, *arguments)


def test_a_figure_folder_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure_dir=/dev/null/figures"]) == 2
    assert "figure_dir=/dev/null/figures cannot be written" in capsys.readouterr().err


def test_the_table_and_the_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["model=qwen2_5_7b", "hardware=h200", "stage=prefill", "batch_size=4", f"figure_dir={tmp_path}"]
    assert main(command) == 0
    out = capsys.readouterr().out
    for text in ("prefill of qwen2_5_7b on h200", "gate_proj", "compute", "memory: weights 15.23", "fits"):
        assert text in out
    assert max(map(len, out.splitlines()[1:18])) <= 80  # The table; lines of text may be longer.
    png, pdf = sorted(tmp_path.iterdir(), reverse=True)
    assert out.splitlines()[-1] == f"figure: {png}  {pdf}"
    assert (png.suffix, pdf.suffix) == (".png", ".pdf")
    assert png.stat().st_size > 20_000
    first = png.read_bytes(), pdf.read_bytes()
    assert main([*command, "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["figure"] == [str(png), str(pdf)]
    assert (png.read_bytes(), pdf.read_bytes()) == first


@pytest.mark.parametrize("counting", ["exact", "llm_viewer"])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_extreme_steps_are_drawn(stage: str, counting: str, tmp_path: Path) -> None:
    """One token, and a step far beyond the card; a model without RoPE and gate; a roof for 8 bits."""
    for arguments in (["sequence_length=1"], ["batch_size=100000", "weight_bits=8", "activation_bits=8"]):
        step = [f"stage={stage}", f"counting={counting}", "model=opt_13b", f"figure_dir={tmp_path}"]
        assert main([*step, *arguments]) == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_it_needs_no_torch_and_numbers_need_no_matplotlib() -> None:
    code = (
        "import sys; from experiments.roofline import main; assert main(['json=true', 'figure=false']) == 0;"
        "assert not {'torch', 'transformers', 'matplotlib', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total_ms"] > 0


def test_help_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "python -m experiments.roofline" in capsys.readouterr().out
