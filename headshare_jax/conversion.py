"""One call from a checkpoint to the same model in another format or type, and the record of it."""

import time
from dataclasses import dataclass

from headshare_jax import convert
from headshare_jax.convert import storage
from headshare_jax.convert.run_checkpoint import RunCheckpoint
from headshare_jax.evaluate.agreement import Agreement, agreement
from headshare_jax.loading import Text, measured_windows
from headshare_jax.parameters import parameter_names
from headshare_jax.report.progress import course
from headshare_jax.resources import peak_memory
from headshare_jax.sharing.ledger import Ledger, ledger
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import cast
from headshare_jax.summary import Sizes, Summary, next_command, sizes
from headshare_jax.typed import typed


@dataclass(frozen=True)
class Converted:
    """What `convert_model` did.

    Attributes:
      model: the new checkpoint.
      step: of a PostShare run's checkpoint, the step that it was converted from; None of other models.
      ledger: what it stores.
      sizes: bytes before and after.
      quality: its predictions against the source's; None if they were not measured.
      summary: all in five lines.
    """

    model: WeightSource
    step: int | None
    ledger: Ledger
    sizes: Sizes
    quality: Agreement | None
    summary: Summary


@typed
def convert_model(
    src: str,
    dst: str,
    *,
    to: str,
    dtype: str | None = None,
    quantize: str | None = None,
    evaluate: Text | None = None,
    seq_len: int = 512,
    overwrite: bool = False,
) -> Converted:
    """Converts a model, tensor by tensor, and measures what was written if a text is given.

    Args:
      src: as for `convert.open_checkpoint`.
      dst: folder to write, or for `gguf` the file.
      to, dtype, quantize, overwrite: as for `compress`.
      evaluate: text to measure both models on, in windows of `seq_len` tokens.

    Raises:
      HeadshareError: as for `convert.save`, or the text cannot be read.
    """
    started = time.monotonic()
    convert.check_output(dst, to, quantize=quantize, dtype=dtype, overwrite=overwrite, sources=(src,))
    path = convert.locate(src)
    source = convert.open_checkpoint(path)
    written = convert.output_dtype(source, to, dtype)
    convert.check_room(source, dst, to=to, dtype=written, quantize=quantize)
    windows_wt = None if evaluate is None else measured_windows(evaluate, path, seq_len, source.config.vocab_size)
    view, quality = cast(source, written), None
    phases = {"writing": 1.0} | ({} if windows_wt is None else {"measuring": 5.0})
    with course(phases) as bar:
        with bar.phase("writing") as show:
            convert.save(
                view, dst, to=to, quantize=quantize, tokenizer_from=path, overwrite=overwrite, progress=show,
                # What a native checkpoint was first made from is told on.
                provenance={"source": src} | getattr(source, "provenance", {}),
            )  # fmt: skip
        found = convert.open_checkpoint(dst)
        if windows_wt is not None:
            with bar.phase("measuring") as show:
                quality = agreement(source, found, windows_wt, progress=show)
    rounded = quantize is not None or any(
        view.dtype(name) != source.dtype(name) for name in parameter_names(view.config)
    )
    said = "not measured, which a text would do" if rounded else "the source's, to the bit"
    step = source.step if isinstance(source, RunCheckpoint) else None
    origin = "" if step is None else f" of the run's checkpoint of step {step}"
    counted = sizes(source, path, found, storage.path(dst))
    return Converted(
        model=found,
        step=step,
        ledger=ledger(found, path=storage.path(dst)),
        sizes=counted,
        quality=quality,
        summary=Summary(
            output=dst,
            done=f"{to}{origin}, {'rounded to ' + (quantize or counted.type) if rounded else 'every weight as it was'}",
            sizes=counted,
            quality=quality,
            text="" if quality is None else str(evaluate),
            quality_note="" if quality is not None else said,
            seconds=time.monotonic() - started,
            memory=peak_memory(),
            next=next_command(storage.path(dst)),
        ),
    )
