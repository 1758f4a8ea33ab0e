//! The operating system's side of sharing: memory objects, mappings, seals, doorbells, descriptor passing, credentials.
