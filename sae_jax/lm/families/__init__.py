"""One file for each supported family of language models, named after its Hugging Face `model_type`."""
