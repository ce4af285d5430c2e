"""Right-or-wrong scores of methods, seeds and items with known true values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

INDEPENDENT = {"item": 0.60, "method x item": 0.15, "run x item": 0.25}
CLUSTERED = {
    "item": 0.45,
    "method x item": 0.10,
    "run x item": 0.22,
    "cluster": 0.15,
    "method x cluster": 0.05,
    "run x cluster": 0.03,
}


def simulated_scores(
    random: np.random.Generator,
    means: Sequence[float],
    seeds: int,
    run_sd: float,
    items: int = 100,
    clusters: int = 0,
) -> pd.DataFrame:
    """Return the scores of a study whose methods have these true means.

    An item is right when a normal latent value is below a threshold. Parts of the latent value
    are common to all runs, to a method's runs, or a run's own, each by item and by cluster. A run's
    true mean varies by `run_sd` around its method's.
    """
    parts = CLUSTERED if clusters else INDEPENDENT
    cluster = np.arange(items) % (clusters or items)
    runs = np.arange(len(means) * seeds)
    method = runs // seeds
    latent = np.zeros((len(runs), items))
    for name, variance in parts.items():
        rows = {"method x": method, "run x": runs}.get(name.rpartition(" ")[0], 0 * runs)
        columns = cluster if name.endswith("cluster") else np.arange(items)
        drawn = random.standard_normal((rows.max() + 1, columns.max() + 1))
        latent += np.sqrt(variance) * drawn[np.ix_(rows, columns)]
    true = np.asarray(means)[method] + run_sd * random.standard_normal(len(runs))
    right = latent < stats.norm.ppf(true.clip(0.01, 0.99))[:, None]
    return pd.DataFrame(
        {
            "label": np.repeat(np.array([f"m{number}" for number in method]), items),
            "seed": np.repeat(runs % seeds, items),
            "item": np.tile(np.arange(items), len(runs)),
            "cluster": np.tile(cluster if clusters else np.full(items, np.nan), len(runs)),
            "value": right.ravel().astype(float),
        }
    )
