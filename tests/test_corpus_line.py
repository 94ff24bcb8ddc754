"""Images without labels -> nnssl_ext corpus -> stock nnUNetv2_train -> the target's network, by stock's own loader."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_ext.data.index import CaseIndex
from nnssl_ext.training.checks import target_network
from tests.conftest import Environment
from tests.datasets import QUICK
from tests.documents import shown_lines
from tests.support.runs import trainer_for
from tests.volumes import volume, write_image, write_series

TRAINER = "nnsslTrainer_VolumeFusion"


@pytest.fixture
def target(with_data: Callable[[str], Environment]) -> Environment:
    """Data set 4, whose own plans train for a moment."""
    environment = with_data("plain")
    folder = environment.dataset("plain").rename(environment.preprocessed / "Dataset004_Target")
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans |= {"dataset_name": folder.name, "nnssl_ext": {**QUICK, "epochs": 1}}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    return environment


def test_the_documents_corpus_pretrains_its_target(target: Environment) -> None:
    corpus, pretraining, weights, finetuning = shown_lines("docs/how-to/corpus.md", "corpus")
    for number in range(3):
        write_image(target.root / "scans" / f"{number}.nii.gz", volume(number, (18, 20, 22)))
    write_series(target.root / "dicom", volume(5, (10, 20, 22)))
    said = target.run("bash", "-ec", f"{corpus} -np 2").stdout
    assert said.rpartition("pretrain with: ")[2].strip() == pretraining

    target.run("bash", "-ec", f"{pretraining} -device cpu")
    file = Path(target.run("bash", "-ec", f'{weights}\necho "$WEIGHTS"').stdout.strip())
    summary = json.loads((file.parent / "pretraining_summary.json").read_text())
    assert summary["training_cases"] == 4
    # the weights are for the target, and the summary says so
    assert summary["next_command"].startswith(finetuning.removesuffix('"$WEIGHTS"'))

    plans = PlansManager(json.loads((target.preprocessed / "Dataset004_Target" / "nnUNetPlans.json").read_text()))
    network = target_network(plans, plans.get_configuration("3d_fullres"), 1, 3)
    load_pretrained_weights(network, str(file))
    written = torch.load(file, weights_only=True)["network_weights"]
    loaded = network.state_dict()
    assert {name: value.shape for name, value in written.items()} == {k: v.shape for k, v in loaded.items()}
    assert all(torch.equal(written[name], loaded[name]) for name in loaded if ".seg_layers." not in name)


def test_a_start_opens_no_case(with_data: Callable[[str], Environment], monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    CaseIndex.build(environment.dataset("plain") / "nnUNetPlans_3d_fullres")
    opened: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr("blosc2.open", lambda *words, **_: opened.append(words))
        trainer = trainer_for("plain", "quick", TRAINER)
        trainer.initialize()
        loader, _ = trainer.get_dataloaders()
    assert not opened
    assert next(loader)
