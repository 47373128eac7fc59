"""Text to measure with: local files and data sets."""

from pathlib import Path

from headshare_jax.errors import HeadshareError


def read(spec: str) -> str:
    """The text of a local file, or a data set's `text` column joined by blank lines.

    Args:
      spec: path of a UTF-8 text file, or `name[:config[:split]]` of a data set (split `test` by default).

    Raises:
      HeadshareError: nothing there, not text, or an empty text.
    """
    path = Path(spec)
    if path.is_dir():
        raise HeadshareError(f"{path} is a folder; give a text file.")
    if path.exists():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise HeadshareError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    else:
        text = "\n\n".join(_dataset_texts(spec))
    if not text.strip():
        raise HeadshareError(f"The text {spec} is empty; give one with words in it.")
    return text


def _dataset_texts(spec: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise HeadshareError(
            f"{spec} is not a file; to read it as a data set, install one more package: "
            "pip install 'headshare-jax[eval]'."
        ) from error
    name, config, split = [*spec.split(":"), "", ""][:3]
    try:
        data = datasets.load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # every data set has its own ways to fail
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HeadshareError(f"{spec} is neither a file nor a data set that can be loaded: {reason}") from error
    if "text" not in data.column_names:
        raise HeadshareError(f"The data set {spec} has no column named text (it has {', '.join(data.column_names)}).")
    return list(data["text"])
