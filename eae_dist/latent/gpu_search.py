"""The copy of a FAISS index on the GPU of this process, and what FAISS' GPU indexes support.

A process uses one GPU, the current one of torch; CUDA_VISIBLE_DEVICES chooses it. The CPU searches what a GPU does not support
or has no memory for.
"""

import functools
import logging

import faiss
import numpy as np
import torch

log = logging.getLogger("eae_dist")

MOST = 2_048  # the most neighbors per query, and the most cells per query, of a GPU index
CODE_LENGTHS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)  # bytes per row that GpuIndexIVFPQ supports
SHARED_MEMORY = 48 * 2**10  # bytes, which hold a query's distances to the 256 values of every byte of a code
FLOAT16_NORMS = (1.0, 100.0)  # norms of the longest row for which float16 holds these distances
WORKSPACE = 2 * 2**30  # bytes: 1.5 GiB for temporary results, the rest for cuBLAS and the blocks of queries
LIST_BLOCK = 32  # rows by which the list of a cell grows


def gpu() -> int | None:
    """Returns the number of the GPU that this process searches on; None unless both torch and FAISS see one."""
    return torch.cuda.current_device() if torch.cuda.is_available() and faiss.get_num_gpus() else None


def coded(d: int, cells: int, longest: float) -> str:
    """Returns the FAISS factory string of cells with codes that a GPU supports, of a byte for two dimensions where possible.

    Rows are padded with zeros up to a multiple of the code's length. longest: the largest norm of a row. Codes of more than 48
    bytes need distances in float16, which are taken only where the norms fit into its range; otherwise a byte stands for more
    dimensions.
    """
    lengths = [m for m in CODE_LENGTHS if not needs_float16(m) or FLOAT16_NORMS[0] <= longest <= FLOAT16_NORMS[1]]
    length = next((m for m in lengths if 2 * m >= d), lengths[-1])
    width = -(-d // length) * length
    return (f"Pad{width}," if width > d else "") + f"IVF{cells},PQ{length}x8np"


def needs_float16(length: int) -> bool:
    """True if a query's distances for codes of so many bytes fit into the memory of a GPU's block only as float16."""
    return length * 256 * 4 > SHARED_MEMORY


def bytes_on_gpu(rows: np.ndarray, index: faiss.Index | None) -> int:
    """Returns the bytes of GPU memory that a copy takes; without an index, that of the rows [b, d] themselves."""
    if index is None:
        return len(rows) * 4 * (rows.shape[1] + 1)  # with their norms
    lists = faiss.extract_index_ivf(index)
    return (lists.ntotal + LIST_BLOCK * lists.nlist) * (lists.code_size + 8) + lists.nlist * 4 * (lists.d + 1)


def copied(rows: np.ndarray, index: faiss.Index | None, metric: int = faiss.METRIC_L2) -> faiss.Index | None:
    """Returns a copy of the index on this process' GPU, without an index an exact one of the rows float32 [b, d] in a metric.

    Returns None where the CPU has to search, and logs why unless there is no GPU or the kind is one that GPUs never search.
    """
    if (device := gpu()) is None or isinstance(index, faiss.IndexHNSW):
        return None
    if isinstance(index, faiss.IndexIVFPQFastScan):
        log.info("the CPU searches the latents: their codes were made where there was no GPU; remove the index to make it again")
        return None
    torch.cuda.empty_cache()  # what torch keeps for later counts as taken
    free, _ = torch.cuda.mem_get_info(device)
    needed = bytes_on_gpu(rows, index) + (0 if resources.cache_info().currsize else WORKSPACE)
    if needed > free:
        mib = needed >> 20, free >> 20
        log.warning("the CPU searches the latents: they need %d MiB and %d MiB of GPU %d are free", *mib, device)
        return None
    options = faiss.GpuClonerOptions()
    if index is None:
        index = (faiss.IndexFlatIP if metric == faiss.METRIC_INNER_PRODUCT else faiss.IndexFlatL2)(rows.shape[1])
        index.add(np.ascontiguousarray(rows))
    else:
        lists = faiss.downcast_index(faiss.extract_index_ivf(index))
        lists.nprobe = 1  # a GPU refuses a copy of an index that looks into more than MOST cells
        options.useFloat16 = isinstance(lists, faiss.IndexIVFPQ) and needs_float16(lists.pq.M)
    try:
        return faiss.index_cpu_to_gpu(resources(), device, index, options)
    except RuntimeError as error:
        log.warning("the CPU searches the latents: FAISS could not copy them to GPU %d (%s)", device, error)
        return None


@functools.cache
def resources() -> "faiss.StandardGpuResources":  # quoted, as faiss-cpu has no such class
    """Returns the memory and the streams that all copies of this process share."""
    return faiss.StandardGpuResources()
