"""geometry.json: norms and cosines of a pool."""

from optimer_hf.files.model import VersionedFile

GEOMETRY = "geometry.json"  # in a study whose vectors were read for their cosines
States = dict[str, tuple[int, int]]  # file name -> size in bytes, modification time in ns


class GeometryFile(VersionedFile):
    """geometry.json: norms and cosines of a pool, with the state of the files that they were read
    from, which changes when a vector or the base changes.
    """

    base: States
    vectors: dict[str, States]
    norms: dict[str, float]
    cosines: list[tuple[str, str, float]]
