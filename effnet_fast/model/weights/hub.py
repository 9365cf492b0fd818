"""Weights from the Hugging Face Hub, in safetensors files alone, at a recorded commit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from effnet_fast.config import LayoutName
from effnet_fast.model.weights.layout import Weights
from effnet_fast.model.weights.read import read_weights

PREFIX = "hf-hub:"
_FILE, _SETTINGS = "model.safetensors", "config.json"

# timm's default weights of each model, at a commit where it is known, else at the newest one. timm has none for
# efficientnet_b6 and b7; these are the defaults of tf_efficientnet_b6 and b7.
DEFAULTS = {
    "efficientnet-b0": "timm/efficientnet_b0.ra_in1k@1b5383e5f79cc0f7fc067e372f8f26a5fa73f26a",
    "efficientnet-b1": "timm/efficientnet_b1.ra4_e3600_r240_in1k",
    "efficientnet-b2": "timm/efficientnet_b2.ra_in1k",
    "efficientnet-b3": "timm/efficientnet_b3.ra2_in1k@0366a75518620e0f2077789202073759f2d61393",
    "efficientnet-b4": "timm/efficientnet_b4.ra2_in1k@2db9846671fa6880c01b7a4608443d276eddc593",
    "efficientnet-b5": "timm/efficientnet_b5.sw_in12k_ft_in1k@d9ab36da11a8b0a4105d889df590ec849378de27",
    "efficientnet-b6": "timm/tf_efficientnet_b6.ns_jft_in1k",
    "efficientnet-b7": "timm/tf_efficientnet_b7.ns_jft_in1k",
    "resnet50": "timm/resnet50.a1_in1k@767268603ca0cb0bfe326fa87277f19c419566ef",
    "resnet152": "timm/resnet152.a1h_in1k",
    "densenet201": "timm/densenet201.tv_in1k",
}
_COMMITS = dict(source.split("@") for source in DEFAULTS.values() if "@" in source)


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub, and the commit, branch or tag to read; None is the newest commit."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, source: str) -> Repository:
        """Parse `REPOSITORY` or `REPOSITORY@REVISION`; timm's default weights without a revision get their commit."""
        name, _, revision = source.partition("@")
        return cls(name, revision or _COMMITS.get(name))

    def __str__(self) -> str:
        return PREFIX + self.name + (f"@{self.revision}" if self.revision else "")


def find_weights(
    pretrained: str | Path | bool, model: str, layout: LayoutName = "auto", revision: str | None = None
) -> Weights:
    """Read the weights that `--pretrained` names.

    Args:
        pretrained: a file; a folder that holds model.safetensors; `hf-hub:REPOSITORY` or `hf-hub:REPOSITORY@REVISION`
            of the Hugging Face Hub; or True for timm's default weights of the model. Downloads are cached, in HF_HOME.
        model: one of `list_models()`.
        layout: see `read_weights`.
        revision: the commit to read instead of the one that `pretrained` names; ignored for files.

    Raises:
        OSError: the weights cannot be read or downloaded, and are not in the cache.
        ValueError: the repository does not exist or has no safetensors file; see also `read_weights`.
    """
    source = PREFIX + DEFAULTS[model] if pretrained is True else str(pretrained)
    if source.startswith(PREFIX):
        repository = Repository.parse(source.removeprefix(PREFIX))
        return _from_hub(replace(repository, revision=revision or repository.revision), layout)
    path = Path(source)
    return read_weights(path / _FILE if path.is_dir() else path, layout)


def _from_hub(repository: Repository, layout: LayoutName) -> Weights:
    weights_file = _download(repository, _FILE)
    assert weights_file is not None
    found = replace(repository, revision=weights_file.parent.name)  # the cache has a folder for each commit
    _download(found, _SETTINGS)
    return replace(read_weights(weights_file, layout), source=str(found), revision=found.revision)


def _download(repository: Repository, file: str) -> Path | None:
    """The path of a file in the cache, downloaded if it is not there; None if there is no config.json."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise ValueError(f"{repository} needs huggingface_hub: pip install 'effnet-fast[hub]'") from error
    try:
        return Path(hub.hf_hub_download(repository.name, file, revision=repository.revision))
    except errors.EntryNotFoundError as error:
        is_offline = isinstance(error, errors.LocalEntryNotFoundError)
        if file == _SETTINGS and (not is_offline or _is_known_absent(repository, file)):
            return None
        if is_offline:
            raise OSError(
                f"{repository} is not in the cache, and the Hugging Face Hub cannot be reached: connect to the network "
                "for the first run (HF_HUB_OFFLINE unset), or give --pretrained a file or a downloaded folder"
            ) from error
        raise ValueError(
            f"{repository} has no {_FILE}, and files of other formats could run code: name another repository, or "
            "give --pretrained a file"
        ) from error
    except errors.GatedRepoError as error:
        raise ValueError(f"{repository} needs permission: ask for it on the Hub, then set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repository}: the repository has no revision {repository.revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{repository} does not exist, or is private: check the name (hf-hub:OWNER/NAME), or set HF_TOKEN"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(
            f"{repository} is no name of a repository: write hf-hub:OWNER/NAME or OWNER/NAME@COMMIT"
        ) from error
    except Exception as error:  # the errors of its HTTP library, which changed between versions
        _raise_download_error(repository, error)


def _is_known_absent(repository: Repository, file: str) -> bool:
    """Whether the cache has recorded that this commit has no such file."""
    import huggingface_hub as hub

    found = hub.try_to_load_from_cache(repository.name, file, revision=repository.revision)
    return found is hub._CACHED_NO_EXIST


def _raise_download_error(repository: Repository, error: Exception) -> NoReturn:
    reason = str(error).partition("\n")[0]
    raise OSError(f"cannot download {repository} ({type(error).__name__}: {reason}); run the command again") from error
