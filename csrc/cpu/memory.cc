#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "swin/fork_mutex.h"

namespace swin::cpu {

#if defined(SWIN_SANITIZED)

// Each piece by itself, so that the sanitizer knows its ends.
void* allocate_memory(std::size_t bytes) { return ::operator new(std::max<std::size_t>(bytes, 1), std::align_val_t{64}); }
void release_memory(void* memory) { ::operator delete(memory, std::align_val_t{64}); }

#else

namespace {

constexpr std::size_t kLine = 64, kPage = std::size_t{2} << 20, kChunk = 4 * kPage;

// Pieces one after the other, each behind a line that holds its chunk's address. A chunk goes when its last piece does.
struct alignas(kLine) Chunk {
  std::size_t bytes, used;
  std::int64_t pieces;
};

ForkMutex g_mutex;
Chunk* g_open = nullptr;  // of kChunk bytes, where the next piece goes if it fits

std::size_t round_up(std::size_t bytes, std::size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

#if defined(__linux__)
// Pages that nobody had before, as those that malloc hands on are small already.
void* map_pages(std::size_t bytes) {
  const std::size_t mapped = bytes + kPage;
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(memory);
  char* chunk = reinterpret_cast<char*>(round_up(reinterpret_cast<std::size_t>(begin), kPage));
  if (chunk > begin) munmap(begin, chunk - begin);
  if (const std::size_t rest = begin + mapped - (chunk + bytes); rest > 0) munmap(chunk + bytes, rest);
  madvise(chunk, bytes, MADV_HUGEPAGE);  // where it is not taken, pages are as small as ever
  return chunk;
}
void unmap_pages(void* memory, std::size_t bytes) { munmap(memory, bytes); }
#else
void* map_pages(std::size_t bytes) { return ::operator new(bytes, std::align_val_t{kPage}); }
void unmap_pages(void* memory, std::size_t) { ::operator delete(memory, std::align_val_t{kPage}); }
#endif

Chunk* make_chunk(std::size_t bytes) { return new (map_pages(bytes)) Chunk{bytes, sizeof(Chunk), 0}; }
void free_chunk(Chunk* chunk) { unmap_pages(chunk, chunk->bytes); }

}  // namespace

void* allocate_memory(std::size_t bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  const std::size_t needed = kLine + round_up(std::max<std::size_t>(bytes, 1), kLine);
  std::lock_guard lock(g_mutex);
  Chunk* chunk = g_open;
  if (sizeof(Chunk) + needed > kChunk) {
    chunk = make_chunk(round_up(sizeof(Chunk) + needed, kPage));
  } else if (chunk == nullptr || chunk->used + needed > chunk->bytes) {
    chunk = make_chunk(kChunk);
    if (g_open != nullptr && g_open->pieces == 0) free_chunk(g_open);
    g_open = chunk;
  }
  char* piece = reinterpret_cast<char*>(chunk) + chunk->used;
  chunk->used += needed;
  ++chunk->pieces;
  *reinterpret_cast<Chunk**>(piece) = chunk;
  return piece + kLine;
}

void release_memory(void* memory) {
  if (memory == nullptr) return;
  Chunk* chunk = *reinterpret_cast<Chunk**>(static_cast<char*>(memory) - kLine);
  std::lock_guard lock(g_mutex);
  if (--chunk->pieces > 0) return;
  if (chunk == g_open) {
    chunk->used = sizeof(Chunk);
  } else {
    free_chunk(chunk);
  }
}

#endif

}  // namespace swin::cpu
