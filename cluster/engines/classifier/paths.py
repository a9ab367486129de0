"""Paths of classifiers, for the router, which does not import their code and its libraries."""

PATHS = frozenset(
    {
        "/",
        "/classify",
        "/decode",
        "/detokenize",
        "/embed",
        "/embed_all",
        "/embed_sparse",
        "/embeddings",
        "/fill-mask",
        "/info",
        "/ner",
        "/next-sentence",
        "/pipeline/feature-extraction",
        "/pipeline/fill-mask",
        "/pipeline/ner",
        "/pipeline/sentence-similarity",
        "/pipeline/sentiment-analysis",
        "/pipeline/text-classification",
        "/pipeline/token-classification",
        "/pooling",
        "/predict",
        "/rerank",
        "/score",
        "/similarity",
        "/token-classification",
        "/tokenize",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/v2/rerank",
    }
)
"""Paths of all tasks and tools; a test compares them with ``serving.routes``."""
