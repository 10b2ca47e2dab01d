"""Where text comes from: any file is numbered units of documents. Imports `tokens`."""
