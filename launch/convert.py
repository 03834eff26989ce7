"""Converts between a run's work directory and the Hugging Face format, and verifies the result.

  python -m launch.convert export --model=runs/mine --output=hf/mine
  python -m launch.convert export --model=runs/adapted --output=hf/adapter --adapter
  python -m launch.convert import --model=hf/mine --output=runs/imported
  python -m launch.convert import --model=hf/base --adapter=hf/adapter/transformers --output=runs/adapted
  python -m launch.convert assemble --gin_file=gin_configs/models/molmo2_4b.gin \\
      --text=hf/Qwen3-4B-Instruct-2507 --vision=hf/siglip2-so400m-patch14-384 --output=runs/start
  python -m launch.convert verify --hf=hf/mine --against=runs/mine
  python -m launch.convert verify --hf=hf/mine --as=vllm --logits_to=logits.npz

export writes config.json, safetensors, tokenizer and processor files that transformers loads (of a model that
points by choosing visual tokens: that MolmoPoint's remote code loads); adapters of the work directory are
merged into their base. With --adapter it writes the adapters alone, as PEFT folders:
OUTPUT/transformers for transformers and peft, OUTPUT/vllm for vLLM and the remote code, whose names differ.
import writes a work directory that launch.generate and launch.evaluate accept and that training can start
from; with --adapter, one of the adapters in a PEFT folder and the base --model. assemble
writes such a directory from a decoder (4B: Qwen3-4B-Instruct-2507; 8B: Qwen3-8B; O-7B: Olmo-3-7B-Instruct)
and a SigLIP2 ViT; parameters between them are initialised from --seed. verify prints one line per check and
exits with status 1 if a check fails.
"""

import pathlib
import sys

from absl import flags

from launch import run
from launch.support import adapted
from launch.support import cli
from launch.support import places
from launch.support import record
from launch.support import trained
from molmo2_jax import checkpoint
from molmo2_jax import finetune
from molmo2_jax.hf import adapter as hf_adapter
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.hf import compare
from molmo2_jax.hf import remote_code
from molmo2_jax.hf import towers
from molmo2_jax.hf import verify as hf_verify
from molmo2_jax.hf import verify_adapter
from molmo2_jax.inputs import tokenizer as tokenizers

flags.DEFINE_flag(flags.Flag(
    flags.ArgumentParser(), flags.ArgumentSerializer(), "adapter", None,
    "export: write adapters as PEFT folders instead of merging them. import: the PEFT folder to read.",
    boolean=True))   # with or without a value
_ADAPTER = flags.FLAGS["adapter"]
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "export: replace an existing output folder.")
_CODE_FROM = flags.DEFINE_string(
    "code_from", None, "export: Hugging Face folder whose remote-code files are copied. Default: the "
    "folder that --model was imported from.")
_HF = flags.DEFINE_string("hf", None, "verify: the Hugging Face folder to check.")
_AGAINST = flags.DEFINE_string(
    "against", None, "verify: work directory or Hugging Face folder that --hf must equal bit for bit.")
_LOGITS = flags.DEFINE_bool(
    "logits", True, "verify: compare logits with transformers if it is installed; needs memory for one "
    "model in float32.")
_AS = flags.DEFINE_enum(
    "as", "reference", ["reference", "vllm"], "verify: whose rules the logits follow. vllm: visual tokens "
    "attend causally, and visual features replace the embedding of <im_patch> instead of being added to it.")
_LOGITS_TO = flags.DEFINE_string(
    "logits_to", None, "verify: file (.npz) to write with token ids, images and float32 logits of the "
    "questions, for comparison with another program.")
_TEXT = flags.DEFINE_string(
    "text", None, "assemble: folder of a Qwen3 or OLMo 3 checkpoint with its tokenizer.")
_VISION = flags.DEFINE_string("vision", None, "assemble: folder of a SigLIP2 checkpoint.")
for _name in ("adapter", "model", "output", "dtype", "gin_file", "gin", "seed", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    commands = {"export": export_model, "import": import_model, "assemble": assemble, "verify": verify}
    if len(arguments) != 1 or arguments[0] not in commands:
        raise ValueError(f"launch.convert must be given one of the words {', '.join(commands)}; "
                         f"got {' '.join(arguments) or 'none'}")
    commands[arguments[0]]()


def export_model() -> None:
    model, output = _model(), _new_folder(_OVERWRITE.value)
    if _ADAPTER.value:
        export_adapter(model, output)
        return
    source = trained.load(model)
    hf_checkpoint.export_checkpoint(source.params, source.model, source.inputs, source.tokenizer, output,
                                    dtype=cli.DTYPE.value, overwrite=_OVERWRITE.value,
                                    code_from=_CODE_FROM.value or source.code)
    _tell(output, f"python -m launch.convert verify --hf={output} --against={model}")


def export_adapter(model: str, output: pathlib.Path) -> None:
    config, found = trained.adapter(model)
    spellings: dict[str, hf_adapter.Spelling] = {"transformers": "native", "vllm": "legacy"}
    ranks = {name: hf_adapter.write(output / name, found.note.lora, found.params, config, spelling,
                                    found.note.base, cli.DTYPE.value)
             for name, spelling in spellings.items()}
    _tell(output, f"python -m launch.convert verify --hf={output / 'transformers'} --against={model}")
    print(f"vLLM needs --max-lora-rank of at least {ranks['vllm']}; without --adapter the export is merged "
          "and loads everywhere")


def import_adapter(model: str, output: pathlib.Path) -> None:
    source = trained.load(model)
    lora, params = hf_adapter.read(_ADAPTER.value, source.model)
    checkpoint.save_params(str(output), params)
    adapted.write(output, adapted.Note(adapted.whole(model), finetune.fingerprint(source.params), lora))
    remote_code.write(remote_code.read(source.code), output / remote_code.NAME)
    _save_settings(output, source.tokenizer, run.RunConfig(model=source.model, inputs=source.inputs))
    _tell(output, f"python -m launch.generate --model={output} --image=FILE --prompt='What is this?'")


def import_model() -> None:
    model, output = _model(), _new_folder()
    if _ADAPTER.value:
        import_adapter(model, output)
        return
    source = trained.load(model)
    checkpoint.save_params(str(output), source.params)
    remote_code.write(remote_code.read(source.code), output / remote_code.NAME)
    _save_settings(output, source.tokenizer, run.RunConfig(model=source.model, inputs=source.inputs))
    _tell(output, f"python -m launch.generate --model={output} --image=FILE --prompt='What is this?'")


def assemble() -> None:
    text, vision, output, config = _given(_TEXT), _given(_VISION), _new_folder(), cli.resolve()
    tokenizer = tokenizers.Tokenizer.from_file(text, config.model.text.vocab_size)
    checkpoint.save_params(str(output), towers.assemble(text, vision, config.model, cli.SEED.value))
    _save_settings(output, tokenizer, run.RunConfig(model=config.model, inputs=config.inputs))
    _tell(output, "python -m launch.train --gin_file=gin_configs/runs/RUN.gin --workdir=FOLDER "
          f"--init_from={output}")


def verify() -> None:
    folder, original = pathlib.Path(places.model(str(_given(_HF)))), None
    if not folder.is_dir():
        raise ValueError(f"--hf must be a folder; got {folder}")
    if (folder / hf_adapter.CONFIG).is_file():
        _end(_verify_adapter(folder))
        return
    if _AGAINST.value:
        source = trained.load(_AGAINST.value)
        original = hf_verify.Original(source.params, source.model, source.inputs, source.tokenizer)
    logits_to = pathlib.Path(_LOGITS_TO.value) if _LOGITS_TO.value else None
    _end(hf_verify.verify(folder, original, _LOGITS.value, _AS.value == "vllm", logits_to))


def _verify_adapter(folder: pathlib.Path) -> list[compare.Check]:
    """Returns the checks of a PEFT folder on its base: --model, or the folder that it names."""
    base = cli.MODEL.value or verify_adapter.base_of(folder)
    if not (pathlib.Path(base) / "config.json").is_file():
        raise ValueError("--model must be the Hugging Face folder of the adapter's base (launch.convert "
                         f"export writes one); got {base}")
    original = trained.adapter(_AGAINST.value)[1] if _AGAINST.value else None
    held = original and (original.note.lora, original.params)
    return verify_adapter.verify(folder, pathlib.Path(base), held, _LOGITS.value)


def _end(checks: list[compare.Check]) -> None:
    """Prints the checks; exits with status 1 if one failed."""
    print(hf_verify.table(checks))
    if any(check.status == "FAIL" for check in checks):
        sys.exit(1)


def _given(flag: flags.FlagHolder) -> pathlib.Path:
    if not flag.value:
        raise ValueError(f"--{flag.name} must be given (--help explains it)")
    return pathlib.Path(flag.value)


def _model() -> str:
    """Returns --model unchanged: it may be the URL of a bucket."""
    _given(cli.MODEL)
    return cli.MODEL.value


def _new_folder(overwrite: bool = False) -> pathlib.Path:
    output = _given(cli.OUTPUT)
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"--output must be a new or empty folder (export accepts --overwrite); got {output}")
    return output


def _tell(output: pathlib.Path, following: str) -> None:
    """Prints what was written, its size, and a command to use next."""
    sizes = [path.stat().st_size for path in output.rglob("*") if path.is_file()]
    print(f"wrote {output}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB\nnext: {following}")


def _save_settings(output: pathlib.Path, tokenizer: tokenizers.Tokenizer, config: run.RunConfig) -> None:
    tokenizer.save(output)
    record.save(output, record.gin_text(config))


if __name__ == "__main__":
    cli.start(main)
