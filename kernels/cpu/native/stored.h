// Packed weights out of files and into them. They are read into the arena, never mapped: a mapped file
// stands in pages of 4 KB.
#pragma once
#include "backend.h"

namespace phalanx {

constexpr int kArrays = 7;  // of a matrix: its pointers, in their order

// A run of bytes in memory and in a file. The digest is there to find damage, not malice.
struct Part {
    void* data;
    int64_t bytes, offset;
    uint64_t digest;
};

// A matrix in a file: as many parts as its type has arrays, the others are empty.
struct Stored {
    int64_t out, in;
    int32_t type;
    Part parts[kArrays];
    Matrix* matrix;
};

uint64_t digest(const void* data, int64_t bytes);

// Fills what is there of `stored`, from its matrix.
void describe(Stored& stored);

// Reads the parts to where they belong, with all threads. False for what is short or damaged.
bool read_parts(Backend& backend, int file, Part* parts, int64_t count);

// Makes the matrices and reads them; all of them or, when it answers false, none.
bool restore(Backend& backend, int file, Stored* stored, int64_t count);

}  // namespace phalanx
