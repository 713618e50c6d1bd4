"""A saved latent index as one FAISS file, which FAISS alone reads: the ids are the numbers of the rows.

flat      the rows of all parts in order
ivf_flat  the cells of all parts side by side: a row stays in its cell
hnsw      one part only, because each part has a graph of its own

Codes (ivf_pq) find neighbors only together with the rows, which lie in other files, so they are refused.

Under cosine the file divides queries by their norms, as the rows are.
"""

import secrets
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np

from eae_dist.distributed import on_rank_zero
from eae_dist.errors import UserError, UserFileError
from eae_dist.latent.index_files import index_description, opened_parts
from eae_dist.latent.index_kinds import EFFORT
from eae_dist.latent.index_part import METRICS, Part
from eae_dist.numerics.atomic_files import fsync


def merge(saved: Path, file: Path) -> None:
    """Writes an index that `LatentIndex.save` wrote as one FAISS file, atomically. Call it on every rank; rank 0 works alone.

    It takes memory for all rows on rank 0. Raises ValueError for a kind that cannot be merged, DamagedIndex, and OSError if the
    file cannot be written.
    """
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            described = index_description(saved)
            parts = opened_parts(saved, described)
            _write(_wrapped(_one_index(parts, described, saved), described), file)


def _one_index(parts: list[Part], described: dict, saved: Path) -> faiss.Index:
    kind, d, metric = described["kind"], described["d"], METRICS[described["metric"]]
    if kind == "flat":
        flat = faiss.IndexFlat(d, metric)
        for part in parts:
            flat.add(np.ascontiguousarray(part.rows))
        return flat
    if kind == "ivf_flat":
        joined = _cells_side_by_side(parts, d, metric)
        joined.nprobe = min(described["effort"] * len(parts), joined.nlist)
        return joined
    if kind == "ivf_pq":
        raise UserError("index.kind=ivf_pq cannot be merged, because codes need the rows beside them; take index.kind=ivf_flat")
    if len(parts) > 1:
        raise UserError(
            f"index.kind={kind} cannot be merged, because each of its {len(parts)} parts has a graph of its own; "
            f"take index.kind=ivf_flat or flat, or remove {saved} and make the index on one rank (--nproc 1)"
        )
    faiss.ParameterSpace().set_index_parameter(parts[0].index, EFFORT[kind], described["effort"])
    assert parts[0].index is not None  # only flat has none
    return parts[0].index


def _cells_side_by_side(parts: list[Part], d: int, metric: int) -> faiss.IndexIVFFlat:
    """Returns an index of the cells of all parts, with the numbers of rows within the whole index."""
    cells = [faiss.extract_index_ivf(part.index) for part in parts]
    quantizer = faiss.IndexFlat(d, metric)
    for one in cells:
        quantizer.add(one.quantizer.reconstruct_n(0, one.nlist))
    joined = faiss.IndexIVFFlat(quantizer, d, quantizer.ntotal, metric)
    joined.is_trained, first = True, 0
    for part, one in zip(parts, cells, strict=True):
        for cell in range(one.nlist):
            if size := one.invlists.list_size(cell):
                ids = faiss.rev_swig_ptr(one.invlists.get_ids(cell), size) + part.start
                joined.invlists.add_entries(first + cell, size, faiss.swig_ptr(ids), one.invlists.get_codes(cell))
        first, joined.ntotal = first + one.nlist, joined.ntotal + one.ntotal
    return joined


def _wrapped(index: faiss.Index, described: dict) -> faiss.Index:
    if described["metric"] != "cosine":
        return index
    return faiss.IndexPreTransform(faiss.NormalizationTransform(index.d, 2.0), index)


def _write(index: faiss.Index, file: Path) -> None:
    aside = file.with_name(f".{file.name}.{secrets.token_hex(8)}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        faiss.write_index(index, str(aside))
        fsync(aside)
        aside.replace(file)
        fsync(file.parent)
    except (OSError, RuntimeError) as error:  # FAISS raises RuntimeError if the disk is full
        raise UserFileError(f"{file} could not be written: {error}") from error
    finally:
        with suppress(OSError):
            aside.unlink()
