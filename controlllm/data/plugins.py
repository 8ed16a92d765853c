"""Datasets and steps of other packages."""

from importlib.metadata import entry_points

from controlllm.errors import UserError


def load_plugins(group: str) -> None:
    """Import what installed packages name under an entry point group. UserError names the one that cannot be."""
    for point in entry_points(group=group):
        try:
            point.load()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - it is another package's code
            package = point.dist.name if point.dist else "?"
            raise UserError(
                f"the package {package} offers '{point.name}' ({point.value}) under {group}, which cannot be imported: "
                f"{type(error).__name__}: {error}; repair or uninstall it"
            ) from None
