"""`headshare share`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import RenderableType

from headshare_jax import convert, pictures
from headshare_jax.cli.command import Command, Destination, Overwrite, Source, say
from headshare_jax.cli.inspect import ledger_data, ledger_table
from headshare_jax.cli.match import MatchFunction, Seed, matched
from headshare_jax.convert import map_file
from headshare_jax.convert.atomic import check_output, new_file
from headshare_jax.errors import HeadshareError
from headshare_jax.ledger import NOT_SAVED, ledger
from headshare_jax.selection import sharing_map
from headshare_jax.sharing import SharingMap
from headshare_jax.transform import share


@dataclass(frozen=True, kw_only=True)
class Share(Command):
    """Let the most similar heads share weights, without training (DirectShare).

    Example: headshare share SmolLM2-135M.gguf smollm2-shared --ratio 0.3
    """

    src: Source
    dst: Destination
    ratio: Annotated[
        float | None, tyro.conf.arg(help="Sharing ratio in [0, 1): the part of all units that become receivers.")
    ] = None
    map: Annotated[Path | None, tyro.conf.arg(help="Use this sharing map instead of matching.")] = None
    match: MatchFunction = "qk"
    seed: Seed = 0
    tie: Annotated[str, tyro.conf.arg(help="Projections to share: some of q, k, v, o, in that order.")] = "qkv"
    chains: Annotated[
        str, tyro.conf.arg(help="resolve: a donor that receives is replaced by its root; forbid: no donor receives.")
    ] = "resolve"
    to: Annotated[str, tyro.conf.arg(help="Format of the output: native, hf or hf-compact.")] = "native"
    save_map: Annotated[Path | None, tyro.conf.arg(help="Where to write the sharing map (.json) besides.")] = None
    plot: Annotated[Path | None, tyro.conf.arg(help="Where to draw who shares with whom (.png, .svg or .pdf).")] = None
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        for output in filter(None, (Path(self.dst), self.save_map, self.plot)):
            check_output(output, overwrite=self.overwrite)
        if (self.ratio is None) == (self.map is None):
            raise HeadshareError("Give either --ratio, to match and choose, or --map, to use a map that exists.")
        path = convert.locate(self.src)
        source = convert.open_checkpoint(path)
        sharing = self._map(source)
        say("sharing")
        model = share(convert.load(source), sharing)
        convert.save(
            model,
            self.dst,
            to=self.to,
            tokenizer_from=path,
            overwrite=self.overwrite,
            provenance={"source": self.src},
        )
        self._write_extras(sharing)
        return {
            "output": self.dst,
            "format": self.to,
            "receivers": len(sharing.receivers),
            "units": sharing.donor.size,
            "ratio": sharing.ratio,
            "tie": sharing.tie,
            "match": sharing.match,
            "ledger": ledger_data(ledger(model, path=Path(self.dst))),
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        yield (
            f"{result['output']}: {result['receivers']} of {result['units']} units use another unit's "
            f"{result['tie']} weights"
        )
        yield ledger_table(result["ledger"])
        yield NOT_SAVED
        if self.to == "hf":
            yield "A plain LLaMA checkpoint holds every head, also those that share: on disk it is at its full size."

    def _map(self, source: convert.Checkpoint) -> SharingMap:
        if self.map is not None:
            return map_file.read(self.map)
        assert self.ratio is not None
        if not 0 <= self.ratio < 1:
            raise HeadshareError(f"The sharing ratio must be at least 0 and below 1, not {self.ratio}.")
        return sharing_map(matched(source, self.match, self.seed), self.ratio, chains=self.chains, tie=self.tie)

    def _write_extras(self, sharing: SharingMap) -> None:
        if self.save_map is not None:
            with new_file(self.save_map, overwrite=self.overwrite) as path:
                path.write_text(sharing.to_json())
        if self.plot is not None:
            with new_file(self.plot, overwrite=self.overwrite) as path:
                pictures.draw_map(sharing, path)
