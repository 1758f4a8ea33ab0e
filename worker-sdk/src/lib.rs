//! What a worker links: sessions, leases, embedding calls, attach. Thin unless the feature local is on.
