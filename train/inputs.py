"""What a run is made from: devices, model, map and texts; all is checked before anything is written."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh

from headshare_jax import convert
from headshare_jax.convert import map_file, storage
from headshare_jax.convert.cache import cache_directory
from headshare_jax.errors import HeadshareError
from headshare_jax.loading import load_tokenizer, text_tokens
from headshare_jax.matching.cosine import match
from headshare_jax.matching.functional import FunctionalSettings, match_functional
from headshare_jax.methods.slimming import even_map
from headshare_jax.methods.table import METHODS
from headshare_jax.methods.work import Amount, Made, MethodSettings, Work
from headshare_jax.model.mesh import make_mesh
from headshare_jax.processes.turns import first_alone, first_for_all
from headshare_jax.sharing.choose import sharing_map
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult, best_donors
from headshare_jax.sharing.source import fingerprint
from headshare_jax.train import data
from headshare_jax.train import recipe as recipes
from headshare_jax.train.room import check_room
from headshare_jax.train.run_folder import MAP
from headshare_jax.train.step import StageContext, trainable_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
# Tokens in the windows that functional matching counts by.
_USUAL_LENGTH = 512


@dataclass(frozen=True)
class Run:
    """What stays the same throughout a run.

    Attributes:
      slimmed: the slim model that its first stage begins with, where it was made for this run and just now.
    """

    recipe: recipes.Recipe
    output: Path
    source: convert.Checkpoint
    sharing: SharingMap
    mesh: Mesh
    blocks: data.Mixture
    eval_tokens: np.ndarray
    slimmed: Made | None = None

    def context(self, number: int) -> StageContext:
        """What a stage's step is made for."""
        return StageContext(self.source.config, self.sharing, self.recipe.stages[number], self.recipe)


def prepare(recipe: recipes.Recipe, output: Path, progress: Progress) -> Run:
    """Opens the model, tokenises the text, and makes or reads the map (`map.json` in `output`); writes nothing.

    What can be wrong with any of it is looked at first, and whether memory and disk suffice.
    """
    mesh = check_devices(recipe)
    source, tokenizer, eval_tokens = open_inputs(recipe)
    stored = output / MAP
    sharing = map_file.read(stored) if storage.is_file(stored) else pairs_to_plan(recipe, source)
    check_room(recipe, source, sharing, mesh, output)
    mixture = partial(data.mixture, recipe.data, tokenizer, cache_directory() / "blocks")
    blocks = first_alone("tokenising", mixture, partial(progress, "tokenising"))
    slimmed = None
    if not storage.is_file(stored) and recipe.sharing.method is not None:
        slimmed = slim_model(recipe, source, blocks.first(recipe.sharing.refit_windows), mesh, progress)
        sharing = _checked(slimmed.map)
    elif not storage.is_file(stored) and _matches(recipe):
        windows_wt = blocks.first(recipe.sharing.refit_windows)

        def matched(step: Callable[[int, int], None]) -> str:
            return matched_pairs(recipe, source, windows_wt, step).to_json()

        sharing = SharingMap.from_json(first_for_all("matching", matched, partial(progress, "matching")))
    return Run(recipe, output, source, sharing, mesh, blocks, eval_tokens, slimmed)


def slim_model(
    recipe: recipes.Recipe, source: convert.Checkpoint, windows_wt: np.ndarray, mesh: Mesh, progress: Progress
) -> Made:
    """The slim model and its map as the recipe says, made on windows of text, int32 [W, T].

    Raises:
      HeadshareError: the budget cannot be met, or there is no room for temporary files.
    """
    settings = MethodSettings(even=recipe.sharing.even)
    work = Work(
        source, settings, windows_wt, phase=lambda label: nullcontext(partial(progress, label)), mesh=mesh
    )  # fmt: skip
    return METHODS["slim"].make(work, Amount(budget=recipe.sharing.budget))


def check_devices(recipe: recipes.Recipe) -> Mesh:
    """The recipe's mesh on this machine's devices; raises HeadshareError if it or the batch does not fit them."""
    sizes = recipe.mesh
    mesh = make_mesh((sizes.data, sizes.fsdp, sizes.tensor), dcn_data=sizes.dcn_data)
    rows, parts = recipe.batch_size // recipe.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise HeadshareError(
            f"batch_size / accumulate ({rows}) must be a multiple of the mesh's data x fsdp ({parts}); change either."
        )
    return mesh


def open_inputs(recipe: recipes.Recipe) -> tuple[convert.Checkpoint, "PreTrainedTokenizerBase", np.ndarray]:
    """The dense model, its tokenizer, and the held-out text as int32 [tokens], empty if the recipe has none.

    Raises:
      HeadshareError: one of them or the training text cannot be read, that text is too short, or the model shares
        heads or has no parameters that a stage trains.
    """
    if recipe.sharing.method is not None and jax.process_count() > 1:
        raise HeadshareError(
            "sharing.method slim makes its model in one process; make it first, with `headshare share --method slim`, "
            "and name it as sharing.start."
        )
    path = convert.locate(recipe.model)
    source = convert.open_checkpoint(path)
    if source.sharing is not None:
        raise HeadshareError(f"{recipe.model} already shares heads; PostShare begins with a dense model.")
    for stage in recipe.stages:
        trainable_names(source.config, stage.trainable)
    tokenizer, held_out = load_tokenizer(path), recipe.data.eval
    data.check_length(recipe.data, tokenizer, recipe.sharing.refit_windows)
    if held_out is None:
        return source, tokenizer, np.empty(0, np.int32)
    return source, tokenizer, text_tokens(held_out, tokenizer, field=recipe.data.text_field)


def _matches(recipe: recipes.Recipe) -> bool:
    return recipe.sharing.start is None and recipe.sharing.map is None


def pairs_to_plan(recipe: recipes.Recipe, source: convert.Checkpoint) -> SharingMap:
    """The map that the recipe names or whose model it begins with, or one like what its method will give.

    Sizes depend on ratio and tie alone, or on the budget.

    Raises:
      HeadshareError: a map or a model that cannot be read, is for another model, or changes nothing.
    """
    settings, config = recipe.sharing, source.config
    if settings.budget is not None:
        return even_map(config, settings.budget)
    if _matches(recipe):
        scores = np.random.default_rng(0).random((config.num_units, config.num_units), np.float32)
        layer = np.repeat(np.arange(config.num_layers), config.num_kv_heads)
        scores = np.where(layer[:, None] > layer[None, :], scores, -np.inf).astype(np.float32)
        best = best_donors(scores, config.num_kv_heads)
        return _chosen(recipe, MatchResult(*best, heads_per_unit=config.heads_per_unit, scores=scores))
    given = settings.start or settings.map
    assert given is not None
    sharing = map_file.read(storage.path(given)) if settings.start is None else convert.open_checkpoint(given).sharing
    if sharing is None:
        raise HeadshareError(f"sharing.start names {given}, which shares nothing; share {recipe.model} first.")
    sharing.check_model(config)
    _check_slim(recipe, sharing)
    if sharing.source is not None and sharing.source != fingerprint(source):
        raise HeadshareError(f"The map of {given} was made for other weights than those of {recipe.model}.")
    return _checked(sharing)


def matched_pairs(
    recipe: recipes.Recipe,
    source: convert.Checkpoint,
    windows_wt: np.ndarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SharingMap:
    """The map that the recipe's match function makes; `functional` looks at windows of text, int32 [W, T]."""
    function = recipe.sharing.match
    if function != "functional":
        return _chosen(recipe, match(source, function, progress=progress))
    # As many tokens as of windows of the usual length.
    usual, seq_len = FunctionalSettings(), windows_wt.shape[1]
    windows, first = (-(-count * _USUAL_LENGTH // seq_len) for count in (usual.windows, usual.prefilter))
    settings = replace(usual, windows=windows, prefilter=first)
    return _chosen(recipe, match_functional(source, windows_wt, settings, progress=progress))


def _chosen(recipe: recipes.Recipe, scores: MatchResult) -> SharingMap:
    settings = recipe.sharing
    chains = "forbid" if settings.match == "functional" else settings.chains
    return _checked(sharing_map(scores, settings.ratio, chains=chains, tie=settings.tie))


def _check_slim(recipe: recipes.Recipe, sharing: SharingMap) -> None:
    """Raises HeadshareError if a map's slim units cannot be trained."""
    if recipe.sharing.map is not None and sharing.widths is not None:
        raise HeadshareError(
            f"The map {recipe.sharing.map} has slim units, but says only how much of them is kept, not with which "
            f"weights; give a model of {recipe.model} that is slim already as sharing.start, and begin with a tied "
            "stage."
        )


def _checked(sharing: SharingMap) -> SharingMap:
    if not sharing.pooled:
        raise HeadshareError(
            "The map has no receivers and no dropped or slim unit, so there is nothing to share; raise the ratio."
        )
    return sharing
