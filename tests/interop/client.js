// A client of fedpeft.v1 that a test drives: each line of standard input is an operation, each line of standard output
// what came of it, {"answer": ...} or {"error": {code, reason, message, fields, retry_s}}.

import readline from "node:readline";
import { decode, encode } from "./codecs.js";
import { enrol, parseToken } from "./enrol.js";
import { Connection, faultOf } from "./rpc.js";
import { fingerprint, prepare, read, sent, sha256 } from "./update.js";

const hex = (data) => Buffer.from(data).toString("hex");
const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

class Client {
  residual = {};
  runs = {};

  connect({ server, name }) {
    this.connection = new Connection(server, name);
  }

  // Enrols; `at` stands for the server that the answer names.
  async enrol({ token, name = "", at }) {
    const { server, credentials } = await enrol(token);
    this.connection = new Connection(at ?? server, name, credentials);
    return { server };
  }

  register({ role = "CLIENT_ROLE_TRAINER", min_protocol = 1, max_protocol = 1 } = {}) {
    const capabilities = { software: "interop 1", encodings: ["float32", "float16", "bfloat16", "sparse+float16"] };
    return this.connection.unary("Register", { min_protocol, max_protocol, role, capabilities });
  }

  // Accepts what is offered until there is something to do, or nothing more to wait for.
  async work() {
    for (;;) {
      const answer = await this.connection.unary("AwaitRound", { until_finished: true });
      if (["training", "evaluation"].includes(answer.outcome) || answer.idle?.finished) return answer;
      if (answer.outcome !== "offer") continue;
      this.runs[answer.offer.run.id] = answer.offer.run;
      await this.connection.unary("AnswerOffer", { run: answer.offer.run.id, answer: "ANSWER_ACCEPTED", examples: 1000 });
    }
  }

  async task() {
    const { training } = await this.work();
    this.ticket = training;
    return training;
  }

  // Pulls a version in two calls, the second where the first one is taken to have ended.
  async pull({ run, version, broken_at: broken = 0 }) {
    const { header, data } = await this.connection.pull({ run, version });
    const rest = broken ? await this.connection.pull({ run, version, offset: broken }) : { data };
    const payload = broken ? Buffer.concat([data.subarray(0, broken), rest.data]) : data;
    if (!sha256(payload).equals(header.manifest.sha256)) throw new Error("the version does not have its digest");
    const held = await this.connection.pull({ run, version, have_sha256: header.manifest.sha256 });
    return { arrays: read(header.manifest, payload), up_to_date: held.header.up_to_date, again: held.data.length };
  }

  // "Training": each value gets a number that depends on its place, the round and `salt`; the update is the difference.
  async train({ salt, examples = 10, broken_at = 0 }) {
    const { ticket, run, round, version, seed } = this.ticket;
    const { arrays } = await this.pull({ run, version, broken_at });
    const { spec, config } = this.runs[run];
    const delta = {};
    for (const { name } of sent(spec, round)) {
      delta[name] = arrays[name].map((base, i) => {
        const trained = Math.fround(base + Math.fround((((i * 37 + round * 11 + salt) % 101) - 50) / 97));
        return Math.fround(trained - base);
      });
    }
    this.update = prepare(sent(spec, round), delta, this.residual, config.codec, seed);
    this.header = { ticket, manifest: this.update.manifest, examples, metrics: { loss: 0.5 + salt } };
    return { payload: hex(this.update.payload), manifest: this.update.manifest };
  }

  // Uploads from where the server stands until it has answered for good, and keeps the residual that this leaves.
  // `header` and `payload` stand for wrong ones; with `rehash` the wrong payload has its own digest in the manifest.
  async push({ header = {}, payload = hex(this.update.payload), rehash = false, ...how } = {}) {
    const bytes = Buffer.from(payload, "hex");
    const first = { ...this.header, ...header };
    const digest = rehash ? sha256(bytes) : this.header.manifest.sha256;
    first.manifest = { ...first.manifest, sha256: digest };
    for (;;) {
      const { committed_bytes: held } = await this.status({ sha256: hex(digest) });
      try {
        const arrived = async (end) => {
          while (Number((await this.status({ sha256: hex(digest) })).committed_bytes) < end) await pause(0.02);
        };
        const receipt = await this.connection.push(first, bytes, Number(held), { arrived, ...how });
        this.residual = this.update.ifCounted;
        return { ...receipt, sha256: hex(receipt.sha256), from: Number(held) };
      } catch (error) {
        const fault = faultOf(error);
        if (fault.retry_s !== undefined) {
          await pause(fault.retry_s);
          continue;
        }
        if (["ROUND_CLOSED", "TICKET_CLOSED"].includes(fault.reason)) this.residual = this.update.ifNot;
        if (fault.reason === "PAYLOAD_INVALID") this.residual = {};
        throw error;
      }
    }
  }

  status({ sha256: digest = hex(this.header.manifest.sha256) } = {}) {
    return this.connection.unary("GetUpload", { ticket: this.ticket.ticket, sha256: Buffer.from(digest, "hex") });
  }

  async withdraw({ reason }) {
    const answer = await this.connection.unary("Withdraw", { ticket: this.ticket.ticket, reason });
    this.residual = this.update?.ifNot ?? this.residual;
    return answer;
  }

  // Takes part until no run is left: all that a client does in its life.
  async live({ salt, examples }) {
    const updates = [];
    for (;;) {
      const { training } = await this.work();
      if (!training) return { updates, residual: this.residual };
      this.ticket = training;
      const { payload, manifest } = await this.train({ salt, examples });
      const { sha256: digest } = await this.push();
      updates.push({ round: training.round, payload, manifest, sha256: digest, settings: training.settings });
    }
  }

  // As an evaluator: takes the next version and pushes figures of it, or those that a test wants pushed.
  async score({ metrics }) {
    const { evaluation } = await this.work();
    const { arrays } = await this.pull(evaluation);
    const values = Object.values(arrays).reduce((sum, each) => sum + each.length, 0);
    await this.connection.unary("PushEvaluation", { ...evaluation, metrics: metrics ?? { accuracy: 0.25, examples: values } });
    return evaluation;
  }

  encode({ values, encoding, seed = 0 }) {
    return hex(encode(Float32Array.from(values, Number), encoding, seed));
  }

  decode({ data, n, encoding }) {
    return Array.from(decode(Buffer.from(data, "hex"), n, encoding), (value) => (Object.is(value, -0) ? "-0" : value));
  }

  prepare({ specs, delta, residual, codec }) {
    const arrays = (given) => Object.fromEntries(Object.entries(given).map(([name, each]) => [name, Float32Array.from(each)]));
    const { payload, ifCounted, ifNot } = prepare(specs, arrays(delta), arrays(residual), codec);
    return { payload: hex(payload), ifCounted, ifNot };
  }

  token({ line }) {
    const { server, enrolment, authority, secret } = parseToken(line);
    return { server, enrolment, authority: hex(authority), secret: hex(secret) };
  }

  fingerprint({ model, size, tensors }) {
    return fingerprint(model, size, tensors);
  }
}

// Typed arrays as lists, and bytes as hexadecimal digits.
const plain = (_, value) => {
  if (value?.type === "Buffer") return Buffer.from(value.data).toString("hex");
  return ArrayBuffer.isView(value) ? Array.from(value) : value;
};

const client = new Client();
for await (const line of readline.createInterface({ input: process.stdin })) {
  const { op, ...given } = JSON.parse(line);
  let said;
  try {
    said = { answer: (await client[op](given)) ?? null };
  } catch (error) {
    said = { error: error.code === undefined ? { code: "LOCAL", message: error.stack } : faultOf(error) };
  }
  console.log(JSON.stringify(said, plain));
}
process.exit(0);
