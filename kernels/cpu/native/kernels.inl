#include "matmul.inl"
#include "rows.inl"
#include "attention.inl"
#include "table.inl"
