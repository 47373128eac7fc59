"""The model card beside an exported Hugging Face model: what is known of the model when it is saved, and no more."""

from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

from headshare_jax.convert import fetched, huggingface
from headshare_jax.convert.gguf_header import read_header
from headshare_jax.families import FAMILIES
from headshare_jax.sharing.ledger import NOT_SAVED, Ledger, ledger
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource

NAME = "README.md"
# As the record of a fit names it, among texts.
OWN_TEXT = "text that the model wrote"
_LOADING = {
    "hf": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")""",
    # The configuration is code too.
    "hf-compact": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)""",
}
_FORMATS = {
    "hf": "The files are a plain {family} checkpoint, which holds every head in full, also those that share, are slim "
    "or dropped: its size is that of the dense model, and so is what it costs to run in transformers.",
    "hf-compact": "The files hold every shared head once, and of slim ones what is kept. `modeling_headshare.py` runs "
    "that in PyTorch: what is dropped or cut is neither multiplied nor cached there.",
}
_CLIENTS = """\
## Other tools

The stored heads are `nn.Linear` modules in `model.q_pool`, `model.k_pool` and so on, one for every run of heads that
layers use together. What acts on such modules acts on each stored head once, whichever layers use it: LoRA
(`target_modules="all-linear"`), quantisation (bitsandbytes, 4 and 8 bit), offload to memory or disk.
`tp_plan="auto"` cuts the MLP and the output head among devices; each holds the attention whole. vLLM takes the model
through its transformers backend, on one device, with a key/value cache as wide as the dense model's. Tools that run no
code from a checkpoint need the format `hf`, at full size: `headshare convert {folder} {folder}-hf --to hf`."""


def license_of(path: Path) -> str | None:
    """The license that a checkpoint states, in its card or in a GGUF file's metadata; None if it states none."""
    if path.is_file():
        stated = read_header(path).metadata.get("general.license")
    else:
        stated = _metadata(path / NAME).get("license")
    return stated if isinstance(stated, str) else None


def _metadata(path: Path) -> dict[str, Any]:
    """What heads a card; nothing if there is no card, or none that can be read."""
    from huggingface_hub import metadata_load

    try:
        if not path.is_file():
            return {}
        with fetched.small_files(path.parent) as folder:
            return metadata_load(folder / path.name) or {}
    except Exception:  # YAML fails in many ways, and a card is for people: no checkpoint is refused for it
        return {}


def card(source: WeightSource, to: str, folder: str, provenance: Mapping[str, Any], documents: Collection[str]) -> str:
    """The card as Markdown headed by YAML.

    Args:
      source: the model.
      to: `hf` or `hf-compact`; without a map, both are plain files.
      folder: name of the model's folder, to load it by.
      provenance: plain data, of which `source` (what it was made from), `license`, `method`, `calibration` and
        `postshare` are told.
      documents: what else lies beside the weights, by file name.
    """
    from huggingface_hub import ModelCardData

    to = to if source.sharing is not None else "hf"
    family = FAMILIES[source.config.family].architecture.removesuffix("ForCausalLM")
    base, stated = (_text(provenance.get(name)) for name in ("source", "license"))
    data = ModelCardData(
        base_model=base if base is not None and huggingface.is_hub_id(base) else None,
        license=stated,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[source.config.family, "headshare", *(["shared-attention-heads"] if source.sharing is not None else [])],
    )
    made_from = "" if base is None else f" from `{base if data.base_model else public_name(base)}`"
    if source.sharing is None:
        about = [f"The files hold a plain {family} model, every attention head with weights of its own."]
    else:
        about = ["## What is shared", _map_in_words(source.sharing), *_history(provenance)]
        about += ["## Size", _table(ledger(source)), f"{_FORMATS[to].format(family=family)} {NOT_SAVED}"]
    beside = "".join(f" `{name}`" for name in documents)
    parts = [
        f"# {folder}",
        f"Made{made_from} with headshare-jax {version('headshare-jax')} (JAX {version('jax')}).",
        *about,
        *([f"More about it lies beside the weights:{beside}."] if documents else []),
        f"## Loading\n\n```python\n{_LOADING[to].format(folder=folder)}\n```",
        *([_CLIENTS.format(folder=folder)] if to == "hf-compact" else []),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def public_name(name: str) -> str:
    """A name without its folders: they are of no use to who loads the model, and tell where its maker keeps things."""
    return name if huggingface.is_hub_id(name.partition(":")[0]) else PureWindowsPath(name).name


def _history(provenance: Mapping[str, Any]) -> list[str]:
    """What was done besides sharing, as far as it was told."""
    trained = post_trained(provenance)
    told = [] if trained is None else [f"{trained}, for the heads to share."]
    match provenance.get("calibration"):
        case {"texts": [*texts], "digest": str(digest), "windows": [int(windows), int(seq_len)]}:
            amount = f"{windows} windows of {seq_len} tokens"
            told.append(f"Calibrated on {amount} ({digest}): {_shares(texts)}, in turns.")
        case {"name": str(name), "digest": str(digest), "windows": [int(windows), int(seq_len)]}:
            amount = f"{windows} windows of {seq_len} tokens"
            told.append(f"Calibrated on {amount} {_whence(name)} ({digest}).")
    return told


def _whence(name: str) -> str:
    return "that the model wrote itself" if name == OWN_TEXT else f"from the start of `{public_name(name)}`"


def _shares(texts: list[Any]) -> str:
    """What was taken of each of several texts, as far as it was told."""
    told = []
    for text in texts:
        match text:
            case {"name": str(name), "digest": str(digest), "windows": int(windows)}:
                told.append(f"{windows} {_whence(name)} ({digest})")
    return " and ".join(told) or "several texts"


def post_trained(provenance: Mapping[str, Any]) -> str | None:
    """What a model was trained by after its map was made, such as `Post-trained by PostShare in 9 steps`; or None."""
    if "postshare" not in provenance:
        return None
    match provenance["postshare"]:
        case {"step": int(step)}:
            return f"Post-trained by PostShare in {step:,} {'step' if step == 1 else 'steps'}"
    return "Post-trained by PostShare"


def _map_in_words(sharing: SharingMap) -> str:
    how = [f"chosen by the method `{sharing.method}`"]
    how += [f"match `{sharing.match}`"] if sharing.match else []
    how += [f"ratio {sharing.ratio:g}"] if sharing.ratio is not None else []
    how += [f"seed {sharing.seed}"] if sharing.seed is not None else []
    return (
        f"{sharing.summary()} (a unit is a key/value head with its query heads), {', '.join(how)}. What becomes of "
        "each: `headshare_map.json`."
    )


def _table(sizes: Ledger) -> str:
    rows = [(row.part, row.dense, row.stored) for row in sizes.rows]
    rows += [("all parameters", sizes.dense, sizes.stored), ("bytes", sizes.dense_bytes, sizes.stored_bytes)]
    lines = ["| | dense | each head once |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {part} | {dense:,} | {stored:,} |" for part, dense, stored in rows)])
