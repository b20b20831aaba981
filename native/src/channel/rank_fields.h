// A rank as it is written and read. For the messages*.cc only.
#ifndef DATADIST_CHANNEL_RANK_FIELDS_H_
#define DATADIST_CHANNEL_RANK_FIELDS_H_

#include "base/bytes.h"
#include "channel/messages.h"

namespace datadist {

inline void Put(Writer &writer, const RankId &rank) {
  writer.U16(rank.pp_rank);
  writer.U16(rank.tp_rank);
}

// False for a rank that no instance has.
inline bool Get(Reader &reader, RankId &rank) {
  rank.pp_rank = reader.U16();
  rank.tp_rank = reader.U16();
  return rank.pp_rank <= kMaxRank && rank.tp_rank <= kMaxRank;
}

}  // namespace datadist

#endif  // DATADIST_CHANNEL_RANK_FIELDS_H_
