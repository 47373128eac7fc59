"""PostShare's objective written a second time, in PyTorch on transformers' models."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from headshare_jax import Llama, LlamaConfig, SharingMap, parameters
from headshare_jax.sharing.source import pool_index

Weights = dict[str, torch.Tensor]

_LAYER_WEIGHTS = {
    "attn_norm_ld": "input_layernorm.weight",
    "o_bias_ld": "self_attn.o_proj.bias",
    "q_norm_lh": "self_attn.q_norm.weight",
    "k_norm_lh": "self_attn.k_norm.weight",
    "mlp_norm_ld": "post_attention_layernorm.weight",
    "gate_ldf": "mlp.gate_proj.weight",
    "up_ldf": "mlp.up_proj.weight",
    "down_lfd": "mlp.down_proj.weight",
}


def leaves(model: Llama) -> Weights:
    """A model's parameters, float32, as tensors that train."""
    names = parameters.parameter_names(model.config)
    return {name: torch.tensor(np.asarray(getattr(model, name)[...]), requires_grad=True) for name in names}


def hf_weights(config: LlamaConfig, sharing: SharingMap | None, params: Mapping[str, torch.Tensor]) -> Weights:
    """transformers' weights made of pools, so that heads which share a row are tied."""
    weights = {"model.embed_tokens.weight": params["embed_vd"], "model.norm.weight": params["final_norm_d"]}
    weights["lm_head.weight"] = params["embed_vd" if config.tie_word_embeddings else "head_vd"]
    rows = {projection: pool_index(config, projection, sharing).tolist() for projection in "qkvo"}
    for layer in range(config.num_layers):
        place = f"model.layers.{layer}"
        for name in params.keys() & _LAYER_WEIGHTS:
            value = params[name][layer]
            weights[f"{place}.{_LAYER_WEIGHTS[name]}"] = value.T if value.ndim == 2 else value
        for projection in "qkv":
            heads = [_row(params[f"{projection}_pool_pdh"], row).T for row in rows[projection][layer]]
            weights[f"{place}.self_attn.{projection}_proj.weight"] = torch.cat(heads)
            if config.attention_bias:
                bias = params[f"{projection}_bias_ph"]
                weights[f"{place}.self_attn.{projection}_proj.bias"] = bias[rows[projection][layer]].flatten()
        heads = [_row(params["o_pool_phd"], row) for row in rows["o"][layer]]
        weights[f"{place}.self_attn.o_proj.weight"] = torch.cat(heads).T
    return weights


def _row(pool: torch.Tensor, row: int) -> torch.Tensor:
    """A row of a pool; zeros for a dropped head, whose row is outside it."""
    return pool[row] if row < len(pool) else torch.zeros(pool.shape[1:])


def predictions(
    hf: Any,
    config: LlamaConfig,
    sharing: SharingMap | None,
    params: Mapping[str, torch.Tensor],
    tokens: np.ndarray,
    segments: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [M, V] and targets [M] of all predicted tokens; every document is run by itself."""
    weights, logits, targets = hf_weights(config, sharing, params), [], []
    for row, documents in zip(tokens, segments, strict=True):
        for document in np.unique(documents[documents != 0]):
            text = torch.as_tensor(row[documents == document], dtype=torch.long)
            logits.append(torch.func.functional_call(hf, weights, (text[None],)).logits[0, :-1])
            targets.append(text[1:])
    return torch.cat(logits), torch.cat(targets)


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor, z_weight: float = 0.0) -> torch.Tensor:
    """Negative log-likelihood with the z term, summed over the tokens."""
    z = torch.logsumexp(logits, dim=-1).square().sum()
    return functional.cross_entropy(logits, targets, reduction="sum") + z_weight * z


def forward_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divergence of the student's distributions [M, V] from the teacher's, times temperature squared, summed."""
    log_student, log_teacher = (
        functional.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher.detach())
    )
    return temperature**2 * functional.kl_div(log_student, log_teacher, log_target=True, reduction="sum")


def penalty(weights: Weights, config: LlamaConfig, sharing: SharingMap, kind: str) -> torch.Tensor:
    """Mean over the pairs of a dense model's weights that share a projection, summed over the projections."""
    assert sharing.unit_tie is not None
    total = torch.zeros(())
    for projection in "qkvo":
        receivers = [unit for unit, tie in enumerate(sharing.unit_tie.flat) if projection in tie]
        for receiver in receivers:
            units = (receiver, int(sharing.donor.flat[receiver]))
            a, b = (_unit(weights, config, projection, unit).flatten() for unit in units)
            total = total + _PENALTIES[kind](a, b) / len(receivers)
    return total


def _unit(weights: Weights, config: LlamaConfig, projection: str, unit: int) -> torch.Tensor:
    """A unit's rows of a q, k or v matrix, or its columns of an o matrix."""
    layer, place = divmod(unit, config.num_kv_heads)
    width = config.head_dim * (config.heads_per_unit if projection in "qo" else 1)
    weight = weights[f"model.layers.{layer}.self_attn.{projection}_proj.weight"]
    return (weight.T if projection == "o" else weight)[place * width : (place + 1) * width]


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return functional.kl_div(q.log(), p, reduction="sum")


def _js(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    p, q = a.softmax(dim=0), b.softmax(dim=0)
    return (_kl(p, (p + q) / 2) + _kl(q, (p + q) / 2)) / 2


_PENALTIES = {
    "norm": lambda a, b: torch.linalg.vector_norm(a - b),
    "mse": functional.mse_loss,
    "kl": lambda a, b: _kl(a.softmax(dim=0), b.softmax(dim=0)),
    "js": _js,
}
