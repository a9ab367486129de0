"""Downloads from the Hugging Face Hub, to the cache that vLLM and transformers read."""

from cluster.errors import BuildError

OTHER_FORMATS = ("original/*", "onnx/*", "openvino/*", "*.gguf", "*.h5", "*.msgpack", "*.ot")
"""Copies of the weights that neither vLLM nor the classifiers load."""


def download(model: str) -> str:
    """Download a model unless the cache has it; return its directory.

    With ``HF_HUB_OFFLINE=1``, nothing is downloaded.

    Raises:
        BuildError: the model does not exist, is not accessible, or cannot be downloaded.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return snapshot_download(model, ignore_patterns=list(OTHER_FORMATS))
    except GatedRepoError as error:
        raise BuildError(
            f"model {model!r} requires its license to be accepted on huggingface.co, and a token "
            "of that account in HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise BuildError(
            f"model {model!r} does not exist on huggingface.co, or HF_TOKEN has no access to it"
        ) from error
    except (OSError, ValueError, httpx.HTTPError) as error:  # bases of the Hub's other errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BuildError(f"model {model!r} cannot be downloaded: {reason}") from error
