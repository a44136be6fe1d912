// The connection: the services from the protos, who calls in the metadata, errors from grpc-status-details-bin.

import { randomBytes } from "node:crypto";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const PROTOS = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "protos");
const OPTIONS = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true, includeDirs: [PROTOS] };
const load = (name) => grpc.loadPackageDefinition(loader.loadSync(`fedpeft/v1/${name}.proto`, OPTIONS)).fedpeft.v1;

const { FederationService } = load("federation_service");
const { AccessService } = load("access_service");

// The messages of google.rpc as FederationService's comment gives them.
const RPC = protobuf.parse(`
  syntax = "proto3";
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message Any { string type_url = 1; bytes value = 2; }
  message ErrorInfo { string reason = 1; string domain = 2; }
  message RetryInfo { Duration retry_delay = 1; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message BadRequest { repeated FieldViolation field_violations = 1; }
  message FieldViolation { string field = 1; string description = 2; }
`).root;

export function faultOf(error) {
  const fault = { code: grpc.status[error.code] ?? String(error), message: error.details ?? error.message, fields: [] };
  const [data] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!data) return fault;
  for (const { typeUrl: type, value } of RPC.lookupType("Status").decode(data).details) {
    const detail = RPC.lookupType(type.slice(type.lastIndexOf(".") + 1)).decode(value);
    if (type.endsWith(".ErrorInfo") && detail.domain === "fedpeft") fault.reason = detail.reason;
    if (type.endsWith(".RetryInfo")) fault.retry_s = Number(detail.retryDelay?.seconds ?? 0) + (detail.retryDelay?.nanos ?? 0) / 1e9;
    if (type.endsWith(".BadRequest")) fault.fields = detail.fieldViolations.map((each) => each.field);
  }
  return fault;
}

export class Connection {
  constructor(server, name, credentials = grpc.credentials.createInsecure()) {
    this.federation = new FederationService(server, credentials);
    this.identity = { instance: randomBytes(16).toString("hex"), name };
  }

  metadata() {
    const metadata = new grpc.Metadata();
    if (this.identity.name) metadata.set("fedpeft-client", this.identity.name);
    metadata.set("fedpeft-instance", this.identity.instance);
    return metadata;
  }

  unary(method, request) {
    return new Promise((resolve, reject) =>
      this.federation[method](request, this.metadata(), { deadline: Date.now() + 60_000 }, (error, answer) =>
        error ? reject(error) : resolve(answer),
      ),
    );
  }

  // Pulls an adapter version from a byte on; returns the header and the bytes.
  async pull(request) {
    let header;
    const parts = [];
    for await (const message of this.federation.PullAdapter(request, this.metadata())) {
      if (message.part === "header") header = message.header;
      else parts.push(message.chunk.data);
    }
    return { header, data: Buffer.concat(parts) };
  }

  // Uploads chunks behind a header, once it is this upload's turn. `cut`: bytes after which, once they have `arrived`, the
  // connection is lost; `end`: bytes after which the stream is half-closed.
  push(header, payload, offset, { arrived, chunk = 65_536, cut = Infinity, end = payload.length } = {}) {
    return new Promise((resolve, reject) => {
      const call = this.federation.PushUpdate(this.metadata(), (error, answer) => (error ? reject(error) : resolve(answer)));
      call.on("error", () => {}); // the callback has it
      call.write({ header });
      call.on("metadata", async (metadata) => {
        if (!metadata.get("fedpeft-turn").length) return; // the call has ended: refused, or received before
        for (let at = offset; at < Math.min(cut, end); at += chunk) {
          const data = payload.subarray(at, Math.min(at + chunk, cut, end));
          await new Promise((written) => call.write({ chunk: { offset: at, data } }, written));
        }
        if (cut > end) return call.end();
        await arrived(cut);
        call.cancel();
      });
    });
  }
}

export function unnamed(server, authority) {
  return new AccessService(server, grpc.credentials.createSsl(authority));
}

export const mutual = (authority, key, chain) => grpc.credentials.createSsl(authority, key, chain);
