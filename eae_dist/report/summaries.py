"""The numbers of an evaluation as text for a person: `summary` of a checkpoint, `summary_of_folders` of two sets of files."""


def summary(metrics: dict) -> str:
    """Returns the metrics of a checkpoint as text for a person."""
    latents = metrics["latents"]
    lines = [
        f"{metrics['checkpoint']} on {metrics['images']:,} {metrics['split']} images of {metrics['data']}: squared error "
        f"{metrics['reconstruction']:.3f} per image, {metrics['reconstruction_per_pixel']:.6f} per pixel and channel, PSNR "
        f"{metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.4f}",
        f"against {metrics['reference_images']:,} {metrics['reference']} images, {compared_by(metrics['features'])}:",
        *summary_of_sets(metrics),
        f"latents of {latents['images']:,} images, beside as many draws of N(0, I): sliced Wasserstein distance from N(0, I) "
        f"{latents['sliced_wasserstein']:.3f} beside {latents['sliced_wasserstein_of_draws']:.3f}, entropy "
        f"{latents['entropy']:.2f} beside {latents['entropy_of_draws']:.2f} nats",
    ]
    return "\n".join([*lines, f"pictures, densities and metrics.json in {metrics['out']}"])


def summary_of_folders(metrics: dict) -> str:
    """Returns the distances of two folders, zip files or files of statistics as text for a person."""
    differ = len({size for size in metrics["sizes"] if size}) > 1
    sizes = [f" ({size})" if size and differ else "" for size in metrics["sizes"]]
    counts = (metrics["reference_images"], metrics["sets"]["generated"]["images"])
    real, generated = ("statistics" if count is None else f"{count:,}" for count in counts)
    images = "" if counts[1] is None else " images"
    heading = f"{generated}{images} of {metrics['generated']}{sizes[1]} against {real} of {metrics['real']}{sizes[0]}"
    return "\n".join([f"{heading}, {compared_by(metrics['features'])}:", *summary_of_sets(metrics)])


def compared_by(features: dict) -> str:
    """Returns the name of the features in a metrics file, and what is done to images before them."""
    if features["metric"] == "frechet_distance":  # of two files that do not say of which features they are
        return f"by {features['preprocessing']}"
    name = "inception" if features["metric"] == "fid" else features["metric"].removeprefix("fd_")
    return f"by the features {name}, {features['preprocessing']}"


def summary_of_sets(metrics: dict) -> list[str]:
    """Returns a line for each set of images, and the warnings."""
    distances = {metrics["headline"]: None} | {metrics["features"][name]: None for name in ("metric", "kernel_metric")}
    names = (*distances, "precision", "recall", "density", "coverage")
    columns = {name: max(14, len(name) + 2) for name in names}  # characters
    lines = [f"{'':24}" + "".join(f"{column:>{width}}" for column, width in columns.items())]
    for which, numbers in metrics["sets"].items():
        cells = (f"{numbers[column]:{width}.4g}" if column in numbers else f"{'':{width}}" for column, width in columns.items())
        lines.append(f"{which:24}" + "".join(cells))
    return lines + [f"warning: {text}" for text in metrics["warnings"]]
