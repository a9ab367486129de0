"""Index a few documents with LlamaIndex and answer a question from them.

The classifier's embeddings find the document; the generator answers. Run it anywhere:
`TANDEM_URL=... TANDEM_API_KEY=... python examples/llama_index_search.py`.
"""

import os

from llama_index.core import Document, VectorStoreIndex
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

DOCUMENTS = [
    "The library opens at nine in the morning and closes at six.",
    "The swimming pool costs four euros for adults.",
    "Dogs must be on a leash in the park.",
]

if __name__ == "__main__":
    server = {
        "api_base": os.environ.get("TANDEM_URL", "http://127.0.0.1:8000") + "/v1",
        "api_key": os.environ.get("TANDEM_API_KEY", "none"),
    }
    index = VectorStoreIndex.from_documents(
        [Document(text=text) for text in DOCUMENTS],
        embed_model=OpenAILikeEmbedding(model_name="sentiment", **server),
    )
    llm = OpenAILike(
        model="smollm2",
        is_chat_model=True,
        context_window=2048,
        max_tokens=40,
        temperature=0,
        **server,
    )
    answer = index.as_query_engine(llm=llm, similarity_top_k=1).query("When does the library open?")
    print("Document:", answer.source_nodes[0].text)
    print("Answer:", answer)
