"""Worker processes that call environments and rewards beside a rank. Imports without torch."""
