"""Published pretrained weights that ``nnssl_ext transfer`` takes, by short name.

Facts are those of the model pages. "?" stands where a page was not found to state it. None of these files could be
downloaded here: the tests read files of the same layout with random values.
"""

from __future__ import annotations

from dataclasses import dataclass

LAYOUT = "layout"
#: A file that the original's own code wrote was compared with the network here, output by output.
FUNCTION = "layout and function"


@dataclass(frozen=True)
class KnownSource:
    """Published weights.

    Attributes:
        what: The network and its pretraining.
        data: What it was pretrained on.
        modality: Of the images.
        license: Of the weights, as the page states it.
        normalization: nnU-Net's scheme, or what stands for it.
        spacing: Millimeters, or how voxels were chosen.
        size: Parameters or bytes.
        fits: Networks that it fits, and how to get them.
        tested: ``LAYOUT`` or ``FUNCTION``.
        address: The page.
        repository: On Hugging Face; '' where the file has to be downloaded by hand.
        file: In the repository; '' for checkpoint_final.pth with its adaptation plan.
    """

    what: str
    data: str
    modality: str
    license: str
    normalization: str
    spacing: str
    size: str
    fits: str
    tested: str
    address: str
    repository: str = ""
    file: str = ""


_RESENC, _PRIMUS = "plans of nnUNetPlannerResEncL", "-tr nnUNet_Primus_M_Trainer"
_HUB = "https://huggingface.co/"


def _open_mind(owner: str, network: str, method: str) -> KnownSource:
    resenc = network == "ResEncL"
    repository = f"{owner}/{network}-OpenMind-{method}"
    return KnownSource(
        what=f"{'ResEnc-L' if resenc else 'Primus-M'}, {method} (Wald et al., arXiv 2412.17041)",
        data="OpenMind: public brain MRI of OpenNeuro",
        modality="MRI",
        license="cc-by-4.0",
        normalization="ZScoreNormalization",
        spacing="1 x 1 x 1",
        size="?",
        fits=_RESENC if resenc else _PRIMUS,
        tested=LAYOUT,
        address=_HUB + repository,
        repository=repository,
    )


def _ssl3d(team: str, method: str) -> KnownSource:
    return KnownSource(
        what=f"ResEnc-L, {method} (SSL3D challenge)",
        data="OpenMind: public brain MRI of OpenNeuro",
        modality="MRI",
        license="cc-by-4.0",
        normalization="?",
        spacing="?",
        size="?",
        fits=_RESENC,
        tested=LAYOUT,
        address=_HUB + "MIC-DKFZ/SSL3D-checkpoints",
        repository="MIC-DKFZ/SSL3D-checkpoints",
        file=f"ResEnc-L/{team}/{team}_ResEncL.pth",
    )


KNOWN_SOURCES: dict[str, KnownSource] = {
    **{
        f"openmind-resenc-{method.lower()}": _open_mind(owner, "ResEncL", method)
        for owner, method in (
            ("MIC-DKFZ", "MAE"),
            ("MIC-DKFZ", "S3D"),
            ("MIC-DKFZ", "MG"),
            ("AnonRes", "VF"),
            ("AnonRes", "SimCLR"),
        )
    },
    **{
        f"openmind-primus-{method.lower()}": _open_mind(owner, "PrimusM", method)
        for owner, method in (("MIC-DKFZ", "MG"), ("MIC-DKFZ", "VF"), ("AnonRes", "SimMIM"))
    },
    "nnfoundation-cnn": KnownSource(
        what="ResEnc-L, nnFoundation (arXiv 2609.26924)",
        data="?",
        modality="CT, MRI",
        license="cc-by-sa-4.0",
        normalization="?",
        spacing="as acquired (noresample)",
        size="410 MB",
        fits=_RESENC,
        tested=LAYOUT,
        address=_HUB + "MIC-DKFZ/nnFoundationCNN",
        repository="MIC-DKFZ/nnFoundationCNN",
    ),
    "nnfoundation-vit": KnownSource(
        what="Primus of 40 blocks, width 1056 (PrimusX), nnFoundation (arXiv 2609.26924)",
        data="?",
        modality="CT, MRI",
        license="?",
        normalization="?",
        spacing="as acquired (noresample)",
        size="?",
        fits="a trainer of your own that builds Primus with 40 blocks and width 1056",
        tested=LAYOUT,
        address=_HUB + "MIC-DKFZ/nnFoundationViT",
        repository="MIC-DKFZ/nnFoundationViT",
    ),
    "ssl3d-mae": _ssl3d("DKFZ_MAE", "masked autoencoder of the organizers"),
    "ssl3d-hilab": _ssl3d("HiLab", "Vox-MSD, team HiLab"),
    "ssl3d-datamen": _ssl3d("Datamen", "VoxCon, team Datamen"),
    "missing-piece-s3d": KnownSource(
        what="ResEnc-L, S3D / SparkMAE (The Missing Piece, MICCAI 2025)",
        data="CT-RATE and ABCD Study",
        modality="CT, MRI",
        license="see its page",
        normalization="?",
        spacing="?",
        size="?",
        fits=_RESENC,
        tested=LAYOUT,
        address=_HUB + "MIC-DKFZ/ResEncL-MissingPiece-S3D",
        repository="MIC-DKFZ/ResEncL-MissingPiece-S3D",
    ),
    "totalsegmentator": KnownSource(
        what="nnU-Net's plain U-Net, supervised (TotalSegmentator v2, five models of 1.5 mm, one of 3 mm)",
        data="TotalSegmentator: 1,559 CTs",
        modality="CT",
        license="differs by model, see its page",
        normalization="CTNormalization",
        spacing="1.5 x 1.5 x 1.5",
        size="?",
        fits="nnUNetPlans",
        tested=LAYOUT,
        address="https://github.com/wasserth/TotalSegmentator/releases",
    ),
    "stu-net": KnownSource(
        what="STU-Net S, B, L or H, supervised (arXiv 2304.06716)",
        data="TotalSegmentator, 4,000 epochs",
        modality="CT",
        license="?",
        normalization="nnU-Net v1's for CT",
        spacing="?",
        size="14.6, 58, 440 or 1,457 million parameters",
        fits="by name: -tr with STU-Net's own trainer; no network of nnU-Net's has its blocks",
        tested=LAYOUT,
        address="https://github.com/uni-medical/STU-Net",
    ),
    "mis-fm": KnownSource(
        what="PCT-Net, VolumeFusion (Wang et al., arXiv 2306.16925)",
        data="10,000 public and about 100,000 private CTs",
        modality="CT",
        license="Apache-2.0 (the repository's)",
        normalization="?",
        spacing="?",
        size="?",
        fits="plans with the recipe mis_fm",
        tested=FUNCTION,
        address="https://github.com/openmedlab/MIS-FM",
    ),
    "3dino-vit": KnownSource(
        what="ViT-L, tokens of 16 voxels, 3DINO (Xu et al. 2025)",
        data="about 100,000 volumes of over 10 organs",
        modality="CT, MRI, PET",
        license="see its page",
        normalization="?",
        spacing="?",
        size="0.3 billion parameters",
        fits="plans with the recipe 3dino or vit_large",
        tested=FUNCTION,
        address="https://github.com/AICONSlab/3DINO",
    ),
    "cspr": KnownSource(
        what="3-D ResNet-18, variable dimension transform (Zhang et al., arXiv 2201.01426)",
        data="natural images, supervised",
        modality="photographs",
        license="see its page",
        normalization="?",
        spacing="none",
        size="?",
        fits="ResidualEncoderUNet with features 64/64/128/256/512 and blocks 1/2/2/2/2",
        tested=LAYOUT,
        address="https://github.com/urmagicsmine/CSPR",
    ),
}


def described(name: str) -> str:
    """Describe a known source in lines."""
    source = KNOWN_SOURCES[name]
    rows = {
        "data": source.data,
        "modality": source.modality,
        "license": source.license,
        "normalization": source.normalization,
        "spacing (mm)": source.spacing,
        "size": source.size,
        "fits": source.fits,
        "tested": source.tested,
        "from": source.repository or source.address,
    }
    return "\n".join([f"{name}: {source.what}", *(f"  {key:<14}{value}" for key, value in rows.items())])
