//! Documents to chunks to a searchable SQLite store, with embeddings by the SDK.
