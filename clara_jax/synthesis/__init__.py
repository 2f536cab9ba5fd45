"""The SCP data factory: questions, answers and paraphrases of documents, written and checked by a
language model."""
