"""Operations: what watches a server from outside."""
