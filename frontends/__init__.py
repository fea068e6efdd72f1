"""Front ends: what a user writes or exports becomes a `Graph` here."""
