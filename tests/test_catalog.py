from nnssl_ext.catalog import catalog
from nnssl_ext.methods import METHODS, TRAINERS


def test_the_catalog_is_what_the_classes_say() -> None:
    read = {entry.name: (entry.trainer, entry.title, entry.citation) for entry in catalog()}
    assert read == {m.name: (TRAINERS[m.name], m.title, m.citation) for m in METHODS.values()}
