"""Add LoRA adapters with their weights into one adapter.

Concatenated factors hold the sum exactly: sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, ...] [A_1; ...],
whose rank is the sum of the ranks. A truncated SVD of that product, computed from its factors, is
the best adapter of a smaller rank (Eckart & Young, 1936).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from optimer_hf.errors import ModelError
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ADAPTER_CONFIG
from optimer_hf.vectors.lora import Product
from optimer_hf.vectors.shapes import PREFIX

Products = Mapping[str, Product]  # of one adapter or of a sum, by base tensor name


@dataclass(frozen=True)
class Truncation:
    """What truncation left out: Frobenius norm of the error relative to that of the sum, over all
    tensors and for the tensor where it is largest.
    """

    error: float = 0.0
    largest: float = 0.0
    tensor: str = ""


def add_adapters(adapters: Mapping[str, Products], weights: Mapping[str, float]) -> Products:
    """Return the weighted sum of adapters (vector name -> products) with scale 1, exact up to one
    float32 rounding of each number of b. Adapters of weight 0 are left out.

    Each product has the rank sum_i r_i over all adapters in the sum. Where an adapter has none for
    a tensor, its factors there are zero, since programs such as vLLM know one rank per adapter.
    """
    used = {name: products for name, products in adapters.items() if weights[name]}
    ranks = {name: _rank_of(products) for name, products in used.items()}
    targets = dict.fromkeys(target for products in used.values() for target in products)
    return {
        target: _concatenate(
            [(products.get(target), weights[name], ranks[name]) for name, products in used.items()]
        )
        for target in targets
    }


def _rank_of(products: Products) -> int:
    return max((product.a.shape[0] for product in products.values()), default=0)


def _concatenate(parts: Sequence[tuple[Product | None, float, int]]) -> Product:
    """Return one product of parts, each with its weight and the rank to fill with zeros."""
    known = next(product for product, _, _ in parts if product is not None)
    n_out, n_in = known.b.shape[0], known.a.shape[1]
    b_parts, a_parts = [], []
    for product, weight, rank in parts:
        b, a = torch.zeros(n_out, rank), torch.zeros(rank, n_in)
        if product is not None:
            r = product.a.shape[0]
            b[:, :r] = (product.b.double() * (weight * product.scale)).float()
            a[:r] = product.a
        b_parts.append(b)
        a_parts.append(a)
    return Product(known.module, torch.cat(b_parts, 1), torch.cat(a_parts), 1.0, known.is_embedding)


def truncate(products: Products, rank: int) -> tuple[Products, Truncation]:
    """Return the best sum of products of at most `rank`, and what that leaves out.

    The product itself is never formed: two QR decompositions reduce it to a square matrix of its
    rank, in float64.
    """
    truncated: dict[str, Product] = {}
    total = lost = largest = 0.0
    where = ""
    for target, product in products.items():
        truncated[target], kept, all_of_it = _truncate_one(product, rank)
        error = math.sqrt(max(all_of_it - kept, 0.0) / all_of_it) if all_of_it else 0.0
        total, lost = total + all_of_it, lost + max(all_of_it - kept, 0.0)
        if error > largest:
            largest, where = error, target
    return truncated, Truncation(math.sqrt(lost / total) if total else 0.0, largest, where)


def _truncate_one(product: Product, rank: int) -> tuple[Product, float, float]:
    """Return a product of at most `rank`, and the sums of squares that it keeps and that there are.

    Both factors get the square roots of the singular values, so that they are of one size.
    """
    q_b, r_b = torch.linalg.qr(product.b.double() * product.scale)
    q_a, r_a = torch.linalg.qr(product.a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = (q_b @ (u[:, :rank] * root)).float(), ((root[:, None] * vh[:rank]) @ q_a.T).float()
    if (missing := rank - len(root)) > 0:  # a layer smaller than the rank
        b = torch.cat([b, torch.zeros(b.shape[0], missing)], 1)
        a = torch.cat([a, torch.zeros(missing, a.shape[1])])
    squares = s.square()
    kept, all_of_it = float(squares[:rank].sum()), float(squares.sum())
    return Product(product.module, b, a, 1.0, product.is_embedding), kept, all_of_it


def write_adapter(
    products: Products, out: Path, base: Checkpoint, options: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Write products of scale 1 and one rank as a PEFT adapter into a directory. `options` are more
    fields of its LoraConfig. Raises ModelError if there is none.
    """
    from peft import LoraConfig

    if not products:
        raise ModelError("every vector has weight 0, so the merge is the base and no adapter.")
    tensors = {}
    for product in products.values():
        names = ("lora_A.weight", "lora_B.weight")
        if product.is_embedding:
            names = ("lora_embedding_A", "lora_embedding_B")
        for name, factor in zip(names, (product.a, product.b), strict=True):
            tensors[f"{PREFIX}{product.module}.{name}"] = factor.to(dtype).contiguous()
    rank = _rank_of(products)
    modules = _shortest_names([product.module for product in products.values()], base.names)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=modules, inference_mode=True, **options
    )
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(out)
    written = json.loads((out / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    written["target_modules"] = sorted(written["target_modules"])  # a set has no order
    text = json.dumps(written, indent=2, sort_keys=True)
    (out / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _shortest_names(modules: Sequence[str], tensors: Sequence[str]) -> list[str]:
    """Return the last parts of module names, if they name no other layer of the base; otherwise the
    names themselves.
    """
    adapted = set(modules)
    last = {module.rpartition(".")[2] for module in modules}
    weights = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    alike = {name for name in weights if name.rpartition(".")[2] in last}
    return sorted(last) if alike == adapted else sorted(adapted)
