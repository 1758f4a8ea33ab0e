//! End-to-end tests with real processes; the hostile client; kill storms.
