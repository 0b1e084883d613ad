"""The words of consistency tokens, for clients and servers. It needs no gRPC."""

KEY = "roster-consistency-token"  # of the metadata
# Instead of a token: any replica may answer, however old its data; only the primary may.
ANY, PRIMARY = "any", "primary"

# How the names of RPCs begin whose reads a replica may answer. `VerifyPassword` always reads on the primary.
READ_PREFIXES = ("Get", "BatchGet", "List", "Count", "Export")
