"""Mean and covariance of features in an .npz file, as pytorch-fid and ADM write them: `mu` [f] and `sigma` [f, f].

Ours also holds `count`, the number of images, and `features`, a JSON text that says by which network and preprocessing.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eae_dist.errors import UserError
from eae_dist.metrics.extractor import Extractor
from eae_dist.metrics.frechet import FeatureStats, Moments
from eae_dist.numerics.atomic_files import replace_file


@dataclass(frozen=True)
class SavedStatistics:
    """The moments in a file. count: number of images, features: record of the extractor; None where the file does not say."""

    path: Path
    moments: Moments
    count: int | None
    features: dict | None

    @classmethod
    def read(cls, path: Path) -> "SavedStatistics":
        """Reads a file without unpickling. Raises ValueError for a damaged file and for arrays that are no moments."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = list(file.files)
                mean, covariance = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
                count = int(file["count"]) if "count" in found else None
                features = json.loads(str(file["features"])) if "features" in found else None
        except FileNotFoundError:
            raise
        except KeyError as error:
            raise UserError(f"{path} has no mu and sigma; it has {', '.join(found) or 'no arrays'}") from error
        except Exception as error:  # zipfile, zlib and numpy raise different types
            raise UserError(f"{path} cannot be read as statistics ({error}); write it again") from error
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not len(mean):
            raise UserError(f"{path}: mu is {list(mean.shape)} and sigma {list(covariance.shape)}; expected [f] and [f, f]")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError(f"{path} holds NaN or infinity; write it again")
        if not np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-6 * np.abs(covariance).max()):
            raise UserError(f"{path}: sigma is not symmetric, so not a covariance; write it again")
        return cls(path, (torch.from_numpy(mean), torch.from_numpy(covariance)), count, features)

    def check_features(self, extractor: Extractor) -> None:
        """Raises ValueError if the statistics are of other features than the extractor's."""
        if extractor.dimensions not in (None, len(self.moments[0])):
            raise UserError(
                f"{self.path} is of {len(self.moments[0])} features, {extractor.metric} has {extractor.dimensions}; set "
                f"evaluate.features to the network that it was made with (pytorch-fid: inception)"
            )
        if self.features is not None:
            record = extractor.record()
            for key in ("metric", "sha256", "preprocessing"):
                if self.features.get(key) != record[key]:
                    got, wanted = self.features.get(key), record[key]
                    raise UserError(f"{self.path} was made with the {key} {got!r}, not {wanted!r}; set evaluate.features alike")


def save_statistics(path: Path, stats: FeatureStats, extractor: Extractor) -> None:
    """Writes statistics for ourselves, pytorch-fid and ADM. Raises OSError."""
    data = io.BytesIO()
    features = json.dumps(extractor.record(), sort_keys=True)
    np.savez(data, mu=stats.mean.numpy(), sigma=stats.covariance.numpy(), count=stats.count, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data.getvalue())
