"""Answer questions from a few documents with a chain of LangChain.

The classifier's embeddings find the document; the generator answers. Run it anywhere:
`TANDEM_URL=... TANDEM_API_KEY=... python examples/langchain_chain.py`.
"""

import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

DOCUMENTS = [
    "The library opens at nine in the morning and closes at six.",
    "The swimming pool costs four euros for adults.",
    "Dogs must be on a leash in the park.",
]
PROMPT = ChatPromptTemplate.from_template("{document}\n\n{question} Answer in one sentence.")

if __name__ == "__main__":
    server = {
        "base_url": os.environ.get("TANDEM_URL", "http://127.0.0.1:8000") + "/v1",
        "api_key": os.environ.get("TANDEM_API_KEY", "none"),
    }
    embeddings = OpenAIEmbeddings(
        model="sentiment",
        check_embedding_ctx_length=False,  # else it counts tokens as OpenAI's models do
        **server,
    )
    retriever = InMemoryVectorStore.from_texts(DOCUMENTS, embeddings).as_retriever(
        search_kwargs={"k": 1}
    )
    find = retriever | (lambda found: found[0].page_content)
    chat = ChatOpenAI(model="smollm2", max_tokens=40, temperature=0, **server)
    inputs = {"document": find, "question": RunnablePassthrough()}
    chain = inputs | PROMPT | chat | StrOutputParser()
    question = "When does the library open?"
    print("Document:", find.invoke(question))
    print("Answer: ", end="")
    for piece in chain.stream(question):
        print(piece, end="", flush=True)
    print()
