// Work shared by threads.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

// GOMP_parallel of the OpenMP that PyTorch uses: its threads do the work instead of waiting for more of their own.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Let threads do parts 0, 1, ... of the work, each with what `start` made for it: start()(part).
template <typename Start>
void share(Parallel parallel, int32_t num_threads, int64_t num_parts, const Start& start) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        auto own = start();
        for (int64_t part; (part = next.fetch_add(1)) < num_parts;) own(part);
    };
    using Work = decltype(work);
    if (parallel != nullptr) {
        parallel([](void* what) { (*static_cast<Work*>(what))(); }, const_cast<void*>(static_cast<const void*>(&work)),
                 static_cast<unsigned>(num_threads), 0);
        return;
    }
    std::vector<std::thread> threads;
    for (int32_t i = 1; i < num_threads; ++i) threads.emplace_back(work);
    work();
    for (auto& thread : threads) thread.join();
}

}  // namespace
