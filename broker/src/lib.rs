//! The control plane: images, leases, sessions, lanes, limits, supervision. Computes nothing and parses no foreign file.
